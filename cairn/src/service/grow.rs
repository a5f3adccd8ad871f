//! Volumes and pools that grow.

use std::io::{Seek as _, SeekFrom};
use std::os::unix::fs::FileTypeExt as _;

use anyhow::{Context, Result, bail};
use cairn_api::v1;
use cairn_engine::control::Command;
use tonic::Status;

use super::{CHANGE_TIMEOUT, Service, blocks_of};

impl Service {
    pub(super) async fn resize(
        &self,
        request: v1::ResizeVolumeRequest,
    ) -> Result<v1::Volume, Status> {
        let name = request.name;
        let blocks = blocks_of(request.size_bytes)?;
        let wanted = name.clone();
        let change = self.ask(|reply| Command::ResizeVolume { name: wanted, blocks, reply });
        match tokio::time::timeout(CHANGE_TIMEOUT, change).await {
            Ok(result) => result?,
            Err(_) => {
                return Err(Status::deadline_exceeded(format!(
                    "the new size of volume `{name}` is not stored by a majority of its replicas yet; \
                     it goes on by itself: see `cairn volume status {name}`"
                )));
            }
        }
        // For people who read the file: the size that counts is in the volume's configuration.
        self.change(|volumes| {
            for volume in volumes.iter_mut().filter(|v| v.name == name) {
                volume.size_bytes = request.size_bytes;
            }
        })?;
        let report = self.volume_reports().await?.into_iter().find(|v| v.name == name);
        let report = report.ok_or_else(|| Status::aborted("it was removed meanwhile"))?;
        Ok(self.volume_message(report))
    }

    pub(super) async fn grow_device(
        &self,
        request: v1::GrowPoolRequest,
    ) -> Result<v1::Pool, Status> {
        let name = request.name;
        let report = self.pool_report(&name).await?;
        let size = (request.size_bytes > 0).then_some(request.size_bytes);
        let devices: Vec<_> = report.devices.iter().filter(|d| d.device_len > 0).collect();
        if size.is_some() && devices.len() != 1 {
            return Err(Status::invalid_argument(format!(
                "pool `{name}` has {} devices: make those longer that are to grow, then say no --size",
                devices.len()
            )));
        }
        let mut grown = false;
        for device in &devices {
            let path = device.path.clone();
            if devices.len() > 1 && path.starts_with("mem:") {
                continue;
            }
            let len = tokio::task::spawn_blocking(move || {
                device_len(&path, size).with_context(|| format!("what the pool lies on, {path}"))
            });
            let device_len = len
                .await
                .map_err(|e| Status::internal(e.to_string()))?
                .map_err(|e| Status::failed_precondition(format!("{e:#}")))?;
            if devices.len() > 1 && device_len / 4096 <= device.device_len / 4096 {
                continue;
            }
            let (pool, device) = (name.clone(), device.id);
            self.ask(|reply| Command::GrowPool { pool, device, device_len, reply }).await?;
            grown = true;
        }
        if !grown {
            return Err(Status::failed_precondition(format!(
                "no device of pool `{name}` is longer than the pool knows: there is nothing to grow into"
            )));
        }
        Ok(Self::pool_message(self.pool_report(&name).await?))
    }
}

/// How long a file or device is now, after a file was made as long as `size`.
fn device_len(path: &str, size: Option<u64>) -> Result<u64> {
    if path.starts_with("mem:") {
        bail!("memory does not grow");
    }
    let mut file = std::fs::File::options().read(true).write(size.is_some()).open(path)?;
    let len = file.seek(SeekFrom::End(0))?;
    let Some(size) = size else { return Ok(len) };
    if file.metadata()?.file_type().is_block_device() {
        bail!(
            "it is a device of {len} bytes: grow it with the tools that made it, then say no --size"
        );
    }
    if size < len {
        bail!("it has {len} bytes and is not made shorter");
    }
    file.set_len(size)?;
    file.sync_all()?;
    Ok(size)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_grow_and_do_not_shrink() {
        let path = std::env::temp_dir().join(format!("cairn-grow-{}", std::process::id()));
        let name = path.to_str().unwrap();
        std::fs::write(&path, [0; 100]).unwrap();
        assert_eq!(device_len(name, None).unwrap(), 100);
        assert_eq!(device_len(name, Some(200)).unwrap(), 200);
        assert_eq!(device_len(name, None).unwrap(), 200);
        assert!(device_len(name, Some(100)).is_err());
        std::fs::remove_file(&path).unwrap();
        assert!(device_len(name, None).is_err() && device_len("mem:1MiB", None).is_err());
    }
}
