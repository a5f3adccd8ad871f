//! 128-bit identifiers, written as UUIDs, and the epoch.

use core::fmt;
use core::str::FromStr;

/// A string that is not an identifier.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not a UUID; write one such as 3f2c1a60-5d1c-4b6e-9f0a-2b7f6f1f9a10")]
pub struct ParseIdError {
    /// What was given.
    pub text: String,
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(pub u128);

        impl $name {
            /// The sixteen bytes of the identifier, in UUID (big-endian) order.
            #[must_use]
            pub const fn to_bytes(self) -> [u8; 16] {
                self.0.to_be_bytes()
            }

            /// The identifier that these sixteen bytes name.
            #[must_use]
            pub const fn from_bytes(bytes: [u8; 16]) -> Self {
                Self(u128::from_be_bytes(bytes))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                uuid::Uuid::from_u128(self.0).fmt(f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self)
            }
        }

        impl FromStr for $name {
            type Err = ParseIdError;

            fn from_str(text: &str) -> Result<Self, ParseIdError> {
                uuid::Uuid::parse_str(text)
                    .map(|u| Self(u.as_u128()))
                    .map_err(|_| ParseIdError { text: text.to_owned() })
            }
        }
    };
}

id! {
    /// Names a snapshot of a volume: the same on each of its replicas.
    SnapshotId
}

id! {
    /// Names a volume: the block device that a host sees.
    VolumeId
}
id! {
    /// Names one replica of a volume.
    ReplicaId
}
id! {
    /// Names a pool: the devices or files that replicas live on.
    PoolId
}
id! {
    /// Names one device of a pool, whatever path it is found under.
    PoolDeviceId
}

/// A generation of a volume's configuration. It never decreases.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Epoch(pub u64);

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_round_trip_through_text_and_bytes() {
        let id = VolumeId(0x3f2c_1a60_5d1c_4b6e_9f0a_2b7f_6f1f_9a10);
        assert_eq!(id.to_string(), "3f2c1a60-5d1c-4b6e-9f0a-2b7f6f1f9a10");
        assert_eq!(id.to_string().parse::<VolumeId>(), Ok(id));
        assert_eq!(VolumeId::from_bytes(id.to_bytes()), id);
        assert!("volume-1".parse::<VolumeId>().is_err());
    }
}
