use proptest::prelude::*;

use super::*;

fn body() -> impl Strategy<Value = Body> {
    let transfer = (any::<u16>(), any::<u16>(), any::<u32>(), any::<u32>())
        .prop_map(|(cccid, ttag, offset, len)| Transfer { cccid, ttag, offset, len });
    prop_oneof![
        (any::<u16>(), any::<u8>(), any::<u8>(), any::<u32>())
            .prop_map(|(pfv, hpda, dgst, maxr2t)| Body::IcReq { pfv, hpda, dgst, maxr2t }),
        (any::<u16>(), any::<u8>(), any::<u8>(), any::<u32>())
            .prop_map(|(pfv, cpda, dgst, maxh2cdata)| Body::IcResp { pfv, cpda, dgst, maxh2cdata }),
        (any::<bool>(), any::<u16>(), any::<u32>())
            .prop_map(|(from_host, fes, fei)| Body::TermReq { from_host, fes, fei }),
        any::<[u8; 32]>().prop_map(|half| {
            let mut sqe = [0; 64];
            sqe[..32].copy_from_slice(&half);
            sqe[32..].copy_from_slice(&half);
            Body::CapsuleCmd(Sqe(sqe))
        }),
        any::<[u8; 16]>().prop_map(|cqe| Body::CapsuleResp(Cqe(cqe))),
        transfer.clone().prop_map(Body::H2cData),
        transfer.clone().prop_map(Body::C2hData),
        transfer.prop_map(Body::R2t),
    ]
}

proptest! {
    #[test]
    fn headers_survive_the_wire(
        body in body(),
        header in any::<bool>(),
        data in any::<bool>(),
        data_len in 1u32..1 << 20,
        alignment in 0u8..32,
    ) {
        let kind = body.kind();
        let data_len = match kind {
            PduType::IcReq | PduType::IcResp | PduType::CapsuleResp | PduType::R2t => 0,
            PduType::H2cTermReq | PduType::C2hTermReq => data_len % 129,
            _ => data_len,
        };
        let made = Header::new(body, Digests { header, data }, data_len, alignment);
        let encoded = made.encode();
        let read = Header::decode(encoded.as_bytes()).unwrap();
        prop_assert_eq!(read, made);
        prop_assert_eq!(read.common().data_len(), data_len);
        prop_assert_eq!(
            made.plen as usize,
            encoded.as_bytes().len()
                + data_len as usize
                + if read.common().has_data_digest() { 4 } else { 0 }
        );
    }

    #[test]
    fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..160)) {
        let _ = Header::decode(&bytes);
    }
}

/// Laid out by hand from the PDU definitions.
#[test]
fn r2t_and_icresp_bytes() {
    let r2t = Body::R2t(Transfer { cccid: 0x0102, ttag: 3, offset: 0, len: 0x20000 });
    let bytes = Header::new(r2t, Digests::default(), 0, 0).encode();
    assert_eq!(
        bytes.as_bytes(),
        [9, 0, 24, 0, 24, 0, 0, 0, 2, 1, 3, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0]
    );
    let digests = Digests { header: true, data: true };
    let body = Body::IcResp { pfv: 0, cpda: 0, dgst: digests.to_wire(), maxh2cdata: 0x0010_0000 };
    let bytes = Header::new(body, digests, 0, 0).encode();
    assert_eq!(bytes.as_bytes().len(), 128);
    assert_eq!(bytes.as_bytes()[..16], [1, 0, 128, 0, 128, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0x10, 0]);
}

#[test]
fn the_offset_of_the_wrong_field_is_told() {
    let good = Header::new(
        Body::H2cData(Transfer { cccid: 1, ttag: 1, offset: 0, len: 16 }),
        Digests::default(),
        16,
        0,
    );
    let table: [(usize, u8, u32); 5] = [(0, 8, 0), (2, 23, 2), (3, 20, 3), (3, 26, 3), (4, 24, 4)];
    for (at, value, fei) in table {
        let mut bytes = good.encode().as_bytes().to_vec();
        bytes[at] = value;
        assert_eq!(Header::decode(&bytes), Err(Violation::field(fei)), "byte {at} = {value}");
    }
}

/// An alignment of 18 dwords once overran the buffer of the encoder: padding may be longer than the
/// longest header.
#[test]
fn padding_may_be_longer_than_a_header() {
    let digests = Digests { header: true, data: true };
    for alignment in 0..32 {
        let header = Header::new(Body::CapsuleCmd(Sqe([0; 64])), digests, 512, alignment);
        assert!(u32::from(header.pdo).is_multiple_of((u32::from(alignment) + 1) * 4));
        assert_eq!(header.encode().as_bytes().len(), usize::from(header.pdo));
    }
}
