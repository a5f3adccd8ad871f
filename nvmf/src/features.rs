//! Feature Identifiers, and the fields of those that Cairn acts on.

/// Arbitration.
pub const ARBITRATION: u8 = 0x01;
/// Power Management.
pub const POWER_MANAGEMENT: u8 = 0x02;
/// Temperature Threshold.
pub const TEMPERATURE_THRESHOLD: u8 = 0x04;
/// Error Recovery.
pub const ERROR_RECOVERY: u8 = 0x05;
/// Volatile Write Cache.
pub const VOLATILE_WRITE_CACHE: u8 = 0x06;
/// Number of Queues.
pub const NUMBER_OF_QUEUES: u8 = 0x07;
/// Asynchronous Event Configuration.
pub const ASYNC_EVENT_CONFIG: u8 = 0x0b;
/// Keep Alive Timer.
pub const KEEP_ALIVE_TIMER: u8 = 0x0f;
/// Host Behavior Support.
pub const HOST_BEHAVIOR: u8 = 0x16;
/// Host Identifier.
pub const HOST_IDENTIFIER: u8 = 0x81;
/// Reservation Notification Mask.
pub const RESERVATION_NOTIFICATION_MASK: u8 = 0x82;
/// Reservation Persistence.
pub const RESERVATION_PERSISTENCE: u8 = 0x83;

/// Asynchronous Event Configuration, and OAES: Namespace Attribute Notices.
pub const AEN_NAMESPACE_ATTRIBUTE: u32 = 1 << 8;
/// Asynchronous Event Configuration, and OAES: Asymmetric Namespace Access Change Notices.
pub const AEN_ANA_CHANGE: u32 = 1 << 11;
/// No bit of Asynchronous Event Configuration, where it is reserved: reservation notifications have none, and are
/// always told.
pub(crate) const AEN_RESERVATION: u32 = 1 << 26;
/// Asynchronous Event Configuration, and OAES: Discovery Log Page Change Notices.
pub const AEN_DISCOVERY_CHANGE: u32 = 1 << 31;

/// DW0 of an Asynchronous Event Request: Namespace Attribute Changed, log page 04h.
pub const EVENT_NAMESPACE_CHANGED: u32 = 0x0004_0002;
/// DW0 of an Asynchronous Event Request: Asymmetric Namespace Access Change, log page 0Ch.
pub const EVENT_ANA_CHANGED: u32 = 0x000c_0302;
/// DW0 of an Asynchronous Event Request: Reservation Log Page Available, log page 80h.
pub const EVENT_RESERVATION: u32 = 0x0080_0006;
/// DW0 of an Asynchronous Event Request: Discovery Log Page Change, log page 70h.
pub const EVENT_DISCOVERY_CHANGED: u32 = 0x0070_f002;

/// DW0 of Number of Queues: `queues` submission and as many completion queues, 0's based.
#[must_use]
pub fn number_of_queues(queues: u16) -> u32 {
    let n = u32::from(queues.saturating_sub(1));
    n | n << 16
}

/// How many queue pairs DW0 of Number of Queues grants.
#[must_use]
pub fn granted_queues(dw0: u32) -> u16 {
    let [a, b, c, d] = dw0.to_le_bytes();
    u16::from_le_bytes([a, b]).min(u16::from_le_bytes([c, d])).saturating_add(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn number_of_queues_is_0s_based() {
        assert_eq!(number_of_queues(4), 0x0003_0003);
        assert_eq!(granted_queues(0x0007_0003), 4);
        assert_eq!(granted_queues(u32::MAX), u16::MAX);
    }
}
