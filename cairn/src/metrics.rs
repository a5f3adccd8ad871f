//! What a process counts, as text for Prometheus over HTTP.
//!
//! Each scrape asks the engine; nothing is counted here. docs/operations.md lists the names.

use std::convert::Infallible;
use std::fmt::{self, Write as _};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use cairn_api::v1;
use http_body_util::Full;
use hyper::body::Bytes;
use hyper::header::CONTENT_TYPE;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, MetricEncoder};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use crate::service::Service;

/// Connections at a time; more wait.
const CONNECTIONS: usize = 16;
/// A scraper has so long to say what it wants, and to take the answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// What the text is.
const FORM: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// What there is to tell.
#[derive(Debug, Clone, Default)]
pub(crate) struct Told {
    pub(crate) volumes: Vec<v1::Volume>,
    pub(crate) pools: Vec<v1::Pool>,
}

type Labels<'a> = Vec<(&'a str, String)>;
/// The labels of a value, and the value.
type Values<'a> = Vec<(Labels<'a>, u64)>;

/// Something that is counted of each volume, or of each pool: its name, what it is, and its value.
type Field<T> = (&'static str, &'static str, fn(&T) -> u64);

fn mends(v: &v1::Volume) -> v1::Mends {
    v.mends.unwrap_or_default()
}

fn rebuild(v: &v1::Volume) -> v1::Rebuild {
    v.rebuild.clone().unwrap_or_default()
}

const VOLUME_GAUGES: &[Field<v1::Volume>] = &[
    ("cairn_volume_serving", "1 where hosts can connect", |v| u64::from(v.serving)),
    ("cairn_volume_size_bytes", "Size", |v| v.size_bytes),
    ("cairn_volume_epoch", "The epoch that it is served in", |v| v.epoch),
    ("cairn_volume_hosts", "Hosts that are connected", |v| v.hosts.len() as u64),
    ("cairn_volume_initiators", "Sessions of iSCSI initiators", |v| {
        v.iscsi.as_ref().map_or(0, |unit| unit.sessions.len() as u64)
    }),
    ("cairn_volume_in_flight_requests", "Requests that are not answered yet", |v| v.in_flight),
    ("cairn_volume_shard", "The shard that serves it", |v| u64::from(v.shard)),
    ("cairn_volume_replicas", "Members that hold data", |v| data(v).count() as u64),
    ("cairn_volume_in_sync_replicas", "Members that hold every acked write", |v| {
        data(v).filter(|c| c.in_sync).count() as u64
    }),
    ("cairn_volume_rebuild_running", "1 while a replica is rebuilt", |v| {
        u64::from(v.rebuild.is_some())
    }),
    ("cairn_volume_rebuild_bytes", "What the rebuild that runs copies in all", |v| {
        rebuild(v).bytes_total
    }),
    ("cairn_volume_rebuild_copied_bytes", "What the rebuild that runs has copied", |v| {
        rebuild(v).bytes_done
    }),
    ("cairn_volume_rebuild_bytes_per_second", "How fast the rebuild that runs copies", |v| {
        rebuild(v).bytes_per_s
    }),
    ("cairn_volume_replacing", "1 while a replica is replaced by another", |v| {
        u64::from(v.replacement.is_some())
    }),
    (
        "cairn_volume_unreconciled_bytes",
        "What may differ since the nexus before this one died",
        |v| v.unreconciled_mib << 20,
    ),
    ("cairn_volume_scrub_running", "1 while it is scrubbed", |v| {
        u64::from(v.scrub.as_ref().is_some_and(|s| s.state == "running"))
    }),
    ("cairn_volume_scrub_verified_bytes", "What the scrub, or the last one, has verified", |v| {
        v.scrub.as_ref().map_or(0, |s| s.verified_bytes)
    }),
    ("cairn_volume_scrub_started_timestamp_seconds", "When the last scrub began; 0: never", |v| {
        v.scrub.as_ref().map_or(0, |s| s.started_unix_s)
    }),
    ("cairn_volume_scrub_finished_timestamp_seconds", "When it ended; 0: it has not", |v| {
        v.scrub.as_ref().map_or(0, |s| s.finished_unix_s)
    }),
];

const VOLUME_COUNTERS: &[Field<v1::Volume>] = &[
    ("cairn_volume_request_errors", "Requests answered with an error", |v| {
        v.counters.unwrap_or_default().errors
    }),
    ("cairn_volume_rebuilt_bytes", "What rebuilds that ended have copied", |v| {
        v.rebuild_totals.unwrap_or_default().bytes
    }),
    ("cairn_volume_bad_blocks", "Blocks of which a copy did not verify", |v| mends(v).attempted),
    ("cairn_volume_healed_blocks", "Copies that were written anew and verify", |v| {
        mends(v).healed_blocks
    }),
    ("cairn_volume_unrecoverable_blocks", "Blocks of which no copy verifies", |v| {
        mends(v).unrecoverable_blocks
    }),
    ("cairn_volume_full_pool_writes", "Writes that met a full pool", |v| mends(v).converged_writes),
];

const POOL_GAUGES: &[Field<v1::Pool>] = &[
    ("cairn_pool_size_bytes", "What it can hold", |p| p.capacity_bytes),
    ("cairn_pool_free_bytes", "What is free", |p| p.free_bytes),
    ("cairn_pool_reserved_bytes", "What of that is kept for thick replicas", |p| p.reserved_bytes),
    ("cairn_pool_promised_bytes", "What its replicas would take if they were full", |p| {
        p.provisioned_bytes
    }),
    ("cairn_pool_dirty_extents", "Extents that a crash makes the next start hash", |p| {
        p.dirty_extents
    }),
    ("cairn_pool_open_extents", "Extents that are not settled among replicas", |p| p.open_extents),
    ("cairn_pool_shard", "The shard that has it", |p| u64::from(p.shard)),
];

const POOL_COUNTERS: &[Field<v1::Pool>] =
    &[("cairn_pool_checksum_mismatches", "Reads that did not verify", |p| p.checksum_mismatches)];

fn data(volume: &v1::Volume) -> impl Iterator<Item = &v1::Child> {
    volume.children.iter().filter(|c| !c.witness && c.state != "idle")
}

const VOLUME_STATES: [&str; 7] =
    ["standby", "assembling", "online", "degraded", "suspended", "fenced", "refused"];
const REPLICA_STATES: [&str; 9] = [
    "online",
    "disconnected",
    "joining",
    "failing",
    "out-of-sync",
    "rebuilding",
    "witness",
    "offline",
    "idle",
];
const POOL_STATES: [&str; 3] = ["online", "degraded", "failed"];

impl Collector for Told {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let to = &mut encoder;
        let version = vec![("version", env!("CARGO_PKG_VERSION").to_owned())];
        gauge(to, "cairn_build_info", "1, and which version it is", vec![(version, 1)])?;
        self.volumes(to)?;
        self.pools(to)
    }
}

impl Told {
    fn volumes(&self, to: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let each = |value: &dyn Fn(&v1::Volume) -> u64| -> Values<'static> {
            self.volumes.iter().map(|v| (vec![("volume", v.name.clone())], value(v))).collect()
        };
        let states = self.volumes.iter().flat_map(|v| {
            let of = vec![("volume", v.name.clone())];
            one_of(&of, &VOLUME_STATES, &v.state)
        });
        gauge(to, "cairn_volume_state", "1 for the state that it is in", states.collect())?;
        for (name, help, value) in VOLUME_GAUGES {
            gauge(to, name, help, each(value))?;
        }
        for (name, help, value) in VOLUME_COUNTERS {
            counter(to, name, help, each(value))?;
        }
        let by = |label: &'static str, of: &dyn Fn(&v1::Volume) -> Vec<(&'static str, u64)>| {
            let mut values = Values::new();
            for volume in &self.volumes {
                for (word, value) in of(volume) {
                    let labels = vec![("volume", volume.name.clone()), (label, word.to_owned())];
                    values.push((labels, value));
                }
            }
            values
        };
        let requests = by("op", &|v| {
            let c = v.counters.unwrap_or_default();
            vec![
                ("read", c.reads),
                ("write", c.writes),
                ("flush", c.flushes),
                ("discard", c.discards),
            ]
        });
        counter(to, "cairn_volume_requests", "Requests answered", requests)?;
        let bytes = by("op", &|v| {
            let c = v.counters.unwrap_or_default();
            vec![("read", c.read_bytes), ("write", c.written_bytes)]
        });
        counter(to, "cairn_volume_bytes", "Bytes read and written", bytes)?;
        let rebuilds = by("outcome", &|v| {
            let totals = v.rebuild_totals.unwrap_or_default();
            vec![("done", totals.done), ("given-up", totals.given_up)]
        });
        counter(to, "cairn_volume_rebuilds", "Rebuilds that ended", rebuilds)?;
        let found = by("outcome", &|v| {
            let s = v.scrub.clone().unwrap_or_default();
            vec![
                ("bad", s.bad_blocks),
                ("healed", s.healed_blocks),
                ("unrecoverable", s.unrecoverable_blocks),
                ("differing", s.differing_blocks),
            ]
        });
        gauge(to, "cairn_volume_scrub_blocks", "What the scrub, or the last one, met", found)?;
        self.replicas(to)
    }

    fn replicas(&self, to: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let each = |value: &dyn Fn(&v1::Child) -> u64| -> Values<'static> {
            let all = self.children().map(|(labels, child)| (labels, value(child)));
            all.collect()
        };
        let states =
            self.children().flat_map(|(labels, c)| one_of(&labels, &REPLICA_STATES, &c.state));
        gauge(to, "cairn_volume_replica_state", "1 for the state that it is in", states.collect())?;
        let in_sync = each(&|c| u64::from(c.in_sync));
        gauge(to, "cairn_volume_replica_in_sync", "1 where it holds every acked write", in_sync)?;
        let connected = each(&|c| u64::from(c.connected));
        gauge(to, "cairn_volume_replica_connected", "1 where it can be reached", connected)
    }

    fn children(&self) -> impl Iterator<Item = (Labels<'static>, &v1::Child)> {
        self.volumes.iter().flat_map(|v| {
            v.children
                .iter()
                .map(|c| (vec![("volume", v.name.clone()), ("replica", c.replica_id.clone())], c))
        })
    }

    fn pools(&self, to: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let each = |value: &dyn Fn(&v1::Pool) -> u64| -> Values<'static> {
            self.pools.iter().map(|p| (vec![("pool", p.name.clone())], value(p))).collect()
        };
        let states = self.pools.iter().flat_map(|p| {
            // Why it failed follows the word.
            let word = p.state.split(':').next().unwrap_or_default();
            one_of(&vec![("pool", p.name.clone())], &POOL_STATES, word)
        });
        gauge(to, "cairn_pool_state", "1 for the state that it is in", states.collect())?;
        for (name, help, value) in POOL_GAUGES {
            gauge(to, name, help, each(value))?;
        }
        for (name, help, value) in POOL_COUNTERS {
            counter(to, name, help, each(value))?;
        }
        Ok(())
    }
}

/// A value for each state that there is: 1 for the one that it is in.
fn one_of<'a>(of: &Labels<'a>, states: &[&str], is: &str) -> Values<'a> {
    let value = |state: &&str| {
        let mut labels = of.clone();
        labels.push(("state", (*state).to_owned()));
        (labels, u64::from(*state == is))
    };
    states.iter().map(value).collect()
}

fn gauge(
    to: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    values: Values<'_>,
) -> fmt::Result {
    let family = to.encode_descriptor(name, help, None, MetricType::Gauge)?;
    each(family, values, |value, metric| ConstGauge::new(value).encode(metric))
}

fn counter(
    to: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    values: Values<'_>,
) -> fmt::Result {
    let family = to.encode_descriptor(name, help, None, MetricType::Counter)?;
    each(family, values, |value, metric| ConstCounter::new(value).encode(metric))
}

fn each(
    mut family: MetricEncoder<'_>,
    values: Values<'_>,
    encode: impl Fn(u64, MetricEncoder<'_>) -> fmt::Result,
) -> fmt::Result {
    for (labels, value) in values {
        encode(value, family.encode_family(&labels)?)?;
    }
    Ok(())
}

/// All of it as text.
pub(crate) fn text(told: Told) -> Result<String> {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(told));
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry).context("metrics as text")?;
    Ok(text)
}

/// Tells whoever asks, for as long as the process lives.
pub(crate) async fn serve<F>(listener: TcpListener, tell: impl Fn() -> F + Clone + Send + 'static)
where
    F: Future<Output = Result<Told>> + Send + 'static,
{
    let room = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok(place) = Arc::clone(&room).acquire_owned().await else { return };
        let Ok((stream, _)) = listener.accept().await else {
            // Out of descriptors, most likely: some come back.
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let tell = tell.clone();
        tokio::spawn(async move {
            let service = service_fn(move |request| answer(request, tell()));
            let serving = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(PATIENCE)
                .keep_alive(false)
                .serve_connection(TokioIo::new(stream), service);
            // A scraper that hangs up, or hangs, is its own business.
            let _served = tokio::time::timeout(2 * PATIENCE, serving).await;
            drop(place);
        });
    }
}

async fn answer<T>(
    request: Request<T>,
    told: impl Future<Output = Result<Told>>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let plain = |status: StatusCode, text: String| {
        let mut response = Response::new(Full::new(Bytes::from(text)));
        *response.status_mut() = status;
        response
    };
    if request.uri().path() != "/metrics" {
        return Ok(plain(StatusCode::NOT_FOUND, "metrics are at /metrics\n".to_owned()));
    }
    if request.method() != Method::GET {
        return Ok(plain(StatusCode::METHOD_NOT_ALLOWED, "GET /metrics\n".to_owned()));
    }
    Ok(match told.await.and_then(text) {
        Ok(text) => {
            let mut response = plain(StatusCode::OK, text);
            response
                .headers_mut()
                .insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static(FORM));
            response
        }
        Err(error) => {
            let mut text = String::new();
            // A String takes it.
            let _written = writeln!(text, "{error:#}");
            plain(StatusCode::SERVICE_UNAVAILABLE, text)
        }
    })
}

/// Listens, and tells what the service knows.
pub(crate) async fn run(service: Arc<Service>, wanted: SocketAddr) -> Result<()> {
    let listener = TcpListener::bind(wanted)
        .await
        .with_context(|| format!("cannot serve metrics on {wanted} (is another process there?)"))?;
    let bound = listener.local_addr()?;
    service.note_metrics(bound);
    tracing::info!(%bound, "serving metrics");
    tokio::spawn(serve(listener, move || {
        let service = Arc::clone(&service);
        async move { service.told().await }
    }));
    Ok(())
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    fn told() -> Told {
        let child = |id: &str, in_sync: bool| v1::Child {
            replica_id: id.to_owned(),
            state: if in_sync { "online" } else { "out-of-sync" }.to_owned(),
            in_sync,
            connected: in_sync,
            ..v1::Child::default()
        };
        let volume = v1::Volume {
            name: "db\"1".to_owned(),
            state: "degraded".to_owned(),
            epoch: 7,
            serving: true,
            children: vec![child("a", true), child("b", false)],
            counters: Some(v1::IoCounters { writes: 42, ..v1::IoCounters::default() }),
            unreconciled_mib: 3,
            rebuild_totals: Some(v1::RebuildTotals { done: 2, given_up: 1, bytes: 99 }),
            ..v1::Volume::default()
        };
        let pool = v1::Pool {
            name: "fast".to_owned(),
            state: "failed: a flush failed".to_owned(),
            free_bytes: 512,
            checksum_mismatches: 5,
            ..v1::Pool::default()
        };
        Told { volumes: vec![volume], pools: vec![pool] }
    }

    async fn get(address: SocketAddr, path: &str) -> String {
        let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: cairn\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn a_scrape_tells_of_volumes_replicas_and_pools() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let serving = tokio::spawn(serve(listener, || async { Ok(told()) }));
        let answer = get(address, "/metrics").await;
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("HTTP/1.1 200"), "{head}");
        assert!(head.contains(FORM), "{head}");
        for line in [
            "# TYPE cairn_volume_state gauge",
            "cairn_volume_state{volume=\"db\\\"1\",state=\"degraded\"} 1",
            "cairn_volume_state{volume=\"db\\\"1\",state=\"online\"} 0",
            "cairn_volume_epoch{volume=\"db\\\"1\"} 7",
            "cairn_volume_in_sync_replicas{volume=\"db\\\"1\"} 1",
            "cairn_volume_replicas{volume=\"db\\\"1\"} 2",
            "# TYPE cairn_volume_requests counter",
            "cairn_volume_requests_total{volume=\"db\\\"1\",op=\"write\"} 42",
            "cairn_volume_rebuilds_total{volume=\"db\\\"1\",outcome=\"given-up\"} 1",
            "cairn_volume_unreconciled_bytes{volume=\"db\\\"1\"} 3145728",
            "cairn_volume_replica_state{volume=\"db\\\"1\",replica=\"b\",state=\"out-of-sync\"} 1",
            "cairn_volume_replica_connected{volume=\"db\\\"1\",replica=\"b\"} 0",
            "cairn_pool_state{pool=\"fast\",state=\"failed\"} 1",
            "cairn_pool_free_bytes{pool=\"fast\"} 512",
            "cairn_pool_checksum_mismatches_total{pool=\"fast\"} 5",
            "# EOF",
        ] {
            assert!(body.lines().any(|l| l == line), "{line} is not in\n{body}");
        }
        assert!(get(address, "/").await.starts_with("HTTP/1.1 404"));
        serving.abort();
    }

    #[test]
    fn every_metric_is_told_in_the_manual() {
        let manual = include_str!("../../docs/operations.md");
        let text = text(told()).unwrap();
        let types = text.lines().filter_map(|line| line.strip_prefix("# TYPE "));
        for (name, kind) in types.filter_map(|line| line.split_once(' ')) {
            let suffix = if kind == "counter" { "_total" } else { "" };
            let full = format!("`{name}{suffix}`");
            assert!(manual.contains(&full), "docs/operations.md does not tell of {full}");
        }
    }
}
