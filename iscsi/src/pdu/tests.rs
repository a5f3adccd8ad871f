use proptest::prelude::*;

use super::*;

fn hex(text: &str) -> [u8; BHS_LEN] {
    let text: String = text.split_whitespace().collect();
    let mut out = [0; BHS_LEN];
    for (i, byte) in out.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * i..2 * i + 2], 16).unwrap();
    }
    out
}

/// Laid out by hand from the figures of RFC 7143, section 11.
#[test]
fn a_scsi_command_is_where_the_rfc_puts_it() {
    let bytes = hex("01a1 0000 00000200 0001000000000000 0000002a 00001000 00000007 00000009
         2a00000000100000080000000000 0000");
    let header = Header::decode(&bytes).unwrap();
    let mut cdb = [0; 16];
    cdb[..10].copy_from_slice(&[0x2a, 0, 0, 0, 0, 0x10, 0, 0, 8, 0]);
    assert_eq!((header.itt, header.data_len, decode_lun(header.lun)), (42, 512, Some(1)));
    assert_eq!(
        header.body,
        Body::ScsiCommand {
            last: true,
            read: false,
            write: true,
            attr: 1,
            edtl: 4096,
            sn: CmdSn { cmd: 7, exp_stat: 9 },
            cdb,
        }
    );
    assert_eq!(header.encode(), bytes);
}

#[test]
fn a_response_is_where_the_rfc_puts_it() {
    let sn = Sn { stat: 3, exp_cmd: 4, max_cmd: 5 };
    let header = Header::new(
        9,
        0,
        Body::DataIn {
            last: true,
            status: Some(0),
            ttt: NO_TAG,
            sn,
            data_sn: 1,
            offset: 512,
            residual: Residual::Underflow(88),
        },
    );
    let want =
        hex("2583 0000 00000000 0000000000000000 00000009 ffffffff 00000003 00000004 00000005
         00000001 00000200 00000058");
    assert_eq!(header.encode(), want);
    let r2t = Header::new(9, 0, Body::R2t { ttt: 7, sn, r2t_sn: 2, offset: 4096, len: 8192 });
    let want =
        hex("3180 0000 00000000 0000000000000000 00000009 00000007 00000003 00000004 00000005
         00000002 00001000 00002000");
    assert_eq!(r2t.encode(), want);
}

#[test]
fn luns_have_two_forms() {
    assert_eq!(decode_lun(encode_lun(0)), Some(0));
    assert_eq!(decode_lun(encode_lun(255)), Some(255));
    assert_eq!(encode_lun(300), 0x412c_0000_0000_0000);
    assert_eq!(decode_lun(encode_lun(300)), Some(300));
    assert_eq!(decode_lun(0x0100_0000_0000_0000), None, "another bus");
    assert_eq!(decode_lun(0x0001_0001_0000_0000), None, "a second level");
    assert_eq!(decode_lun(0xc101_0000_0000_0000), None, "a well known logical unit");
}

#[test]
fn residuals_tell_which_way() {
    assert_eq!(Residual::of(512, 512), Residual::None);
    assert_eq!(Residual::of(512, 10_000), Residual::Underflow(9488));
    assert_eq!(Residual::of(512, 200), Residual::Overflow(312));
    assert_eq!(Residual::of(u64::MAX, 0), Residual::Overflow(u32::MAX));
}

proptest! {
    /// What a header says survives being written and read again, whatever bytes it began as.
    #[test]
    fn decoding_what_was_encoded_gives_the_same(
        op in prop::sample::select(vec![
            0u8, 1, 2, 3, 4, 5, 6, 0x10, 0x20, 0x21, 0x22, 0x23, 0x24, 0x25, 0x26, 0x31, 0x32, 0x3f,
        ]),
        rest in prop::collection::vec(any::<u8>(), 47),
    ) {
        let mut bytes = [0; BHS_LEN];
        bytes[0] = op | rest[0] & 0x40;
        bytes[1..].copy_from_slice(&rest);
        let header = Header::decode(&bytes).unwrap();
        prop_assert_eq!(Header::decode(&header.encode()), Ok(header));
    }
}
