//! MODE SENSE and MODE SELECT.

use super::cdb::op;
use super::sense::Sense;
use super::unit::{Modes, Unit};
use crate::wire::{put, put_u24, u16_at, u24_at};

const RECOVERY: u8 = 0x01;
const CACHING: u8 = 0x08;
const CONTROL: u8 = 0x0a;
const EXCEPTIONS: u8 = 0x1c;
const ALL_PAGES: u8 = 0x3f;
const ALL_SUBPAGES: u8 = 0xff;

const WCE: u8 = 0x04;
const D_SENSE: u8 = 0x04;
const SWP: u8 = 0x08;

/// Which values of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Control {
    Current,
    Changeable,
    Default,
}

/// A page with its two bytes of header.
fn page(code: u8, control: Control, unit: &Unit) -> Vec<u8> {
    let len = if code == CACHING { 0x12 } else { 0x0a };
    let mut b = vec![0; 2 + len];
    b[0] = code;
    b[1] = len.to_le_bytes()[0];
    let modes = match control {
        Control::Current => unit.modes,
        Control::Default => Unit::default_modes(&unit.config),
        // What can be changed is set.
        Control::Changeable => Modes {
            write_cache: unit.config.volatile_write_cache,
            write_protect: true,
            descriptors: true,
        },
    };
    match code {
        CACHING if modes.write_cache => b[2] = WCE,
        CONTROL => {
            if modes.descriptors {
                b[2] = D_SENSE;
            }
            if modes.write_protect {
                b[4] = SWP;
            }
            if control != Control::Changeable {
                // QUEUE ALGORITHM MODIFIER: any order; TAS: whose command another aborts is told so;
                // BUSY TIMEOUT PERIOD: none.
                b[3] = 0x10;
                b[5] = 0x40;
                put(&mut b, 8, &[0xff, 0xff]);
            }
        }
        _ => {}
    }
    b
}

/// The parameter data of MODE SENSE.
///
/// # Errors
/// A page that there is not, or saved values.
pub(crate) fn sense(cdb: &[u8; 16], unit: &Unit) -> Result<Vec<u8>, Sense> {
    let long = cdb[0] == op::MODE_SENSE_10;
    let control = match cdb[2] >> 6 {
        0 => Control::Current,
        1 => Control::Changeable,
        2 => Control::Default,
        _ => return Err(Sense::SAVING_NOT_SUPPORTED),
    };
    let (code, subpage) = (cdb[2] & 0x3f, cdb[3]);
    let mut pages = Vec::new();
    match (code, subpage) {
        (ALL_PAGES, 0 | ALL_SUBPAGES) => {
            for code in [RECOVERY, CACHING, CONTROL, EXCEPTIONS] {
                pages.extend(page(code, control, unit));
            }
        }
        (RECOVERY | CACHING | CONTROL | EXCEPTIONS, 0 | ALL_SUBPAGES) => {
            pages = page(code, control, unit);
        }
        (RECOVERY | CACHING | CONTROL | EXCEPTIONS | ALL_PAGES, _) => {
            return Err(Sense::invalid_cdb(3, 7));
        }
        _ => return Err(Sense::invalid_cdb(2, 5)),
    }
    let blocks = unit.config.blocks;
    let block_len = unit.config.block_size.bytes();
    let (dbd, llbaa) = (cdb[1] & 0x08 != 0, long && cdb[1] & 0x10 != 0);
    let mut descriptor = Vec::new();
    if !dbd && llbaa {
        descriptor.resize(16, 0);
        put(&mut descriptor, 0, &blocks.to_be_bytes());
        put(&mut descriptor, 12, &block_len.to_be_bytes());
    } else if !dbd {
        descriptor.resize(8, 0);
        put(&mut descriptor, 0, &u32::try_from(blocks).unwrap_or(u32::MAX).to_be_bytes());
        put_u24(&mut descriptor, 5, block_len);
    }
    // WP, DPOFUA.
    let specific = 0x10 | if unit.is_write_protected() { 0x80 } else { 0 };
    let descriptor_len = descriptor.len().to_le_bytes()[0];
    let mut b = if long {
        vec![0, 0, 0, specific, u8::from(llbaa), 0, 0, descriptor_len]
    } else {
        vec![0, 0, specific, descriptor_len]
    };
    b.extend(descriptor);
    b.extend(pages);
    if long {
        let len = u16::try_from(b.len() - 2).unwrap_or(0);
        put(&mut b, 0, &len.to_be_bytes());
    } else {
        b[0] = (b.len() - 1).to_le_bytes()[0];
    }
    Ok(b)
}

/// What MODE SELECT makes of the modes.
///
/// # Errors
/// What cannot be changed, or makes no sense.
pub(crate) fn select(cdb: &[u8; 16], list: &[u8], unit: &Unit) -> Result<Modes, Sense> {
    if cdb[1] & 0x10 == 0 && !list.is_empty() {
        // PF: the pages are SPC's, not a vendor's.
        return Err(Sense::invalid_cdb(1, 4));
    }
    if cdb[1] & 1 != 0 {
        return Err(Sense::invalid_cdb(1, 0));
    }
    let mut modes = unit.modes;
    if list.is_empty() {
        return Ok(modes);
    }
    let (header, descriptor_len, long) = if cdb[0] == op::MODE_SELECT_10 {
        if list.len() < 8 {
            return Err(Sense::PARAMETER_LIST_LENGTH);
        }
        (8, usize::from(u16_at(list, 6)), list[4] & 1 != 0)
    } else {
        if list.len() < 4 {
            return Err(Sense::PARAMETER_LIST_LENGTH);
        }
        (4, usize::from(list[3]), false)
    };
    let invalid = |at: usize| Sense::invalid_parameter(u16::try_from(at).unwrap_or(u16::MAX));
    let descriptor =
        list.get(header..header + descriptor_len).ok_or(Sense::PARAMETER_LIST_LENGTH)?;
    let block_len = match (descriptor_len, long) {
        (0, _) => None,
        (8, false) => Some(u24_at(descriptor, 5)),
        (16, true) => Some(crate::wire::u32_at(descriptor, 12)),
        _ => return Err(invalid(header - 1)),
    };
    if block_len.is_some_and(|len| len != unit.config.block_size.bytes()) {
        return Err(invalid(header));
    }
    let mut at = header + descriptor_len;
    while at < list.len() {
        let rest = &list[at..];
        if rest.len() < 2 {
            return Err(Sense::PARAMETER_LIST_LENGTH);
        }
        let code = rest[0] & 0x3f;
        // SPF: none of the pages has subpages.
        if rest[0] & 0x40 != 0 || ![RECOVERY, CACHING, CONTROL, EXCEPTIONS].contains(&code) {
            return Err(invalid(at));
        }
        let (current, changeable) =
            (page(code, Control::Current, unit), page(code, Control::Changeable, unit));
        if rest[1] != current[1] {
            return Err(invalid(at + 1));
        }
        let new = rest.get(..current.len()).ok_or(Sense::PARAMETER_LIST_LENGTH)?;
        for i in 2..current.len() {
            if (new[i] ^ current[i]) & !changeable[i] != 0 {
                return Err(invalid(at + i));
            }
        }
        match code {
            CACHING => modes.write_cache = new[2] & WCE != 0,
            CONTROL => {
                modes.descriptors = new[2] & D_SENSE != 0;
                modes.write_protect = new[4] & SWP != 0;
            }
            _ => {}
        }
        at += current.len();
    }
    Ok(modes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scsi::cdb::cdb;

    fn unit() -> Unit {
        Unit::new(crate::loopback::unit(0))
    }

    #[test]
    fn all_pages_follow_the_block_descriptor() {
        let b = sense(&cdb(&[0x1a, 0, 0x3f, 0, 255]), &unit()).unwrap();
        assert_eq!(usize::from(b[0]), b.len() - 1);
        assert_eq!(b[..12], [67, 0, 0x10, 8, 0, 0, 0x10, 0, 0, 0, 2, 0]);
        assert_eq!((b[12], b[24], b[26], b[44], b[56]), (1, 8, WCE, 0x0a, 0x1c));
        let b = sense(&cdb(&[0x5a, 0x18, 0x08]), &unit()).unwrap();
        assert_eq!((b.len(), b[7], b[8]), (28, 0, 8), "no block descriptor");
        let err = |bytes: &[u8]| sense(&cdb(bytes), &unit()).unwrap_err();
        assert_eq!(err(&[0x1a, 0, 0xff]), Sense::SAVING_NOT_SUPPORTED);
        assert_eq!(err(&[0x1a, 0, 0x02]), Sense::invalid_cdb(2, 5));
    }

    #[test]
    fn only_what_is_changeable_changes() {
        let unit = unit();
        let mut list = vec![0; 4];
        list.extend(page(CONTROL, Control::Current, &unit));
        list[8] |= SWP;
        let select = |list: &[u8]| select(&cdb(&[0x15, 0x10]), list, &unit);
        assert!(select(&list).unwrap().write_protect);
        list[7] ^= 0x20;
        assert_eq!(select(&list), Err(Sense::invalid_parameter(7)));
        let mut list = vec![0; 4];
        list.extend(page(CACHING, Control::Current, &unit));
        list[6] = 0;
        assert!(!select(&list).unwrap().write_cache);
        assert_eq!(select(&list[..10]), Err(Sense::PARAMETER_LIST_LENGTH));
        assert_eq!(select(&[0, 0, 0]), Err(Sense::PARAMETER_LIST_LENGTH));
        assert_eq!(select(&[]), Ok(unit.modes));
    }

    #[test]
    fn no_list_panics() {
        for len in 0..40 {
            for fill in [0, 1, 8, 0x0a, 0x40, 0xff] {
                let list = vec![fill; len];
                let _ = select(&cdb(&[0x15, 0x10]), &list, &unit());
                let _ = select(&cdb(&[0x55, 0x10]), &list, &unit());
            }
        }
    }
}
