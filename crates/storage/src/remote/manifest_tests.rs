use proptest::prelude::*;

use super::*;

/// A map with frames at ascending numbers, a few in each object.
fn map() -> impl Strategy<Value = FrameMap> {
    let gaps = prop::collection::vec((1..5u32, 1..200_000u32, any::<[u8; 16]>(), any::<bool>()), 0..40);
    (gaps, 12..19u32, 0..4096u64).prop_map(|(frames, bits, tail)| {
        let last: u64 = frames.iter().map(|f| u64::from(f.0)).sum();
        let mut map = FrameMap::new((last << bits) + tail, 1 << bits);
        let (mut at, mut pending) = (0, Vec::new());
        for (gap, len, sum, close) in frames {
            at += gap;
            pending.push((at - 1, len.min(stored_max(1 << bits)), Checksum::from_bytes(sum)));
            if close {
                map.push(Checksum::from_bytes(sum), &std::mem::take(&mut pending));
            }
        }
        if !pending.is_empty() {
            map.push(Checksum::of(b"last"), &pending);
        }
        map
    })
}

fn manifest() -> impl Strategy<Value = Manifest> {
    let others = prop::collection::btree_map(prop::sample::select(&Artifact::ALL[..]), map(), 0..4);
    (others, map(), 1..u128::MAX).prop_map(|(mut artifacts, metadata, id)| {
        artifacts.insert(Artifact::Metadata, metadata);
        let artifacts = artifacts.into_iter().map(|(a, m)| (a, Arc::new(m))).collect();
        Manifest::new(BuildId::from_bytes(id.to_be_bytes()), artifacts)
    })
}

/// Bytes with a checksum that makes them look whole.
fn sealed(mut body: Vec<u8>) -> Vec<u8> {
    let sum = blake3::hash(&body);
    body.extend_from_slice(sum.as_bytes());
    body
}

proptest! {
    #[test]
    fn it_is_read_as_it_was_written(manifest in manifest()) {
        let bytes = manifest.to_bytes();
        prop_assert_eq!(Manifest::parse(&bytes), Ok(manifest));
    }

    #[test]
    fn a_flipped_bit_or_a_cut_is_seen(manifest in manifest(), at in any::<prop::sample::Index>()) {
        let bytes = manifest.to_bytes();
        prop_assert!(Manifest::parse(&bytes[..at.index(bytes.len())]).is_err());
        let mut flipped = bytes.clone();
        let bit = at.index(bytes.len() * 8);
        flipped[bit / 8] ^= 1 << (bit % 8);
        prop_assert!(Manifest::parse(&flipped).is_err());
    }

    /// What an attacker who can compute checksums writes is refused, or means what it says.
    #[test]
    fn changed_bytes_with_a_right_checksum_are_valid_or_refused(
        manifest in manifest(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
    ) {
        let mut body = manifest.to_bytes();
        body.truncate(body.len() - SUM);
        for (at, value) in changes {
            let at = at.index(body.len());
            body[at] = value;
        }
        let bytes = sealed(body);
        if let Ok(parsed) = Manifest::parse(&bytes) {
            prop_assert_eq!(parsed.to_bytes(), bytes);
            for (_, map) in parsed.artifacts() {
                for frame in map.frames() {
                    prop_assert!(map.content_len(frame.number) > 0);
                    let (found, object) = map.locate(frame.number).unwrap();
                    prop_assert_eq!(found, frame);
                    prop_assert!(frame.offset + frame.len <= object.len);
                }
            }
        }
    }

    #[test]
    fn any_bytes_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        prop_assert!(Manifest::parse(&bytes).is_err());
        let mut framed = [&MAGIC[..], &VERSION.to_le_bytes()].concat();
        framed.extend_from_slice(&bytes);
        let _ = Manifest::parse(&sealed(framed));
    }
}

#[test]
fn other_versions_and_impossible_counts_are_told_apart() {
    let header = |version: u32| [&MAGIC[..], &version.to_le_bytes()].concat();
    assert_eq!(Manifest::parse(&header(2)), Err(ManifestError::Version(2)));
    assert_eq!(Manifest::parse(b"{}"), Err(ManifestError::Magic));
    // Claims four billion frames in a few bytes: no memory is reserved for them.
    let mut body = header(VERSION);
    body.put_slice(&[1; 16]);
    body.put_u8(1);
    body.put_u8(6);
    body.put_u64_le(1 << 40);
    body.put_u32_le(256 << 10);
    body.put_u32_le(1);
    body.put_u32_le(1 << 22);
    assert_eq!(Manifest::parse(&sealed(body)), Err(ManifestError::Length));
}
