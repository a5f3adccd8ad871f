//! Seeded mutation of inputs: the same seed and corpus give the same sequence of inputs.

use fastrand::Rng;

/// No input grows past this.
pub const MAX_INPUT_LEN: usize = 64 * 1024;

/// Changes stacked on one input.
const MAX_STEPS: u32 = 6;

/// Values at which lengths, counts and offsets tend to go wrong.
const INTERESTING: [u64; 18] = [
    0,
    1,
    2,
    7,
    8,
    16,
    24,
    72,
    127,
    128,
    255,
    256,
    4095,
    4096,
    0x7fff,
    0xffff,
    0x7fff_ffff,
    u64::MAX,
];

/// Makes an input from the corpus, which must not be empty.
pub fn mutate(rng: &mut Rng, corpus: &[Vec<u8>], words: &[&[u8]]) -> Vec<u8> {
    let mut input = corpus[rng.usize(..corpus.len())].clone();
    for _ in 0..rng.u32(1..=MAX_STEPS) {
        step(rng, &mut input, corpus, words);
    }
    input.truncate(MAX_INPUT_LEN);
    input
}

fn step(rng: &mut Rng, input: &mut Vec<u8>, corpus: &[Vec<u8>], words: &[&[u8]]) {
    let at = rng.usize(..=input.len());
    match rng.u32(..12) {
        0 | 1 => {
            if let Some(byte) = input.get_mut(at) {
                *byte ^= 1 << rng.u32(..8);
            }
        }
        2 => {
            if let Some(byte) = input.get_mut(at) {
                *byte = rng.u8(..);
            }
        }
        3 | 4 => integer(rng, input, at),
        5 => {
            let added: Vec<u8> = (0..rng.usize(1..=16)).map(|_| rng.u8(..)).collect();
            splice(input, at, 0, &added);
        }
        6 => input.truncate(at),
        7 => {
            let count = rng.usize(..=(input.len() - at).min(64));
            splice(input, at, count, &[]);
        }
        8 => {
            // A stretch again: a duplicated header, or a longer list.
            let end = at + rng.usize(..=(input.len() - at).min(256));
            let copy = input[at..end].to_vec();
            splice(input, end, 0, &copy);
        }
        9 => {
            let other = &corpus[rng.usize(..corpus.len())];
            let from = rng.usize(..=other.len());
            input.truncate(at);
            input.extend_from_slice(&other[from..]);
        }
        10 if !words.is_empty() => {
            let word = words[rng.usize(..words.len())];
            let over = if rng.bool() { word.len().min(input.len() - at) } else { 0 };
            splice(input, at, over, word);
        }
        _ => {
            // Two inputs one after the other: streams hold more than one unit.
            let other = &corpus[rng.usize(..corpus.len())];
            input.extend_from_slice(other);
        }
    }
}

/// Writes or adds an integer, of 1 to 8 bytes and either order of bytes, where a field may be.
fn integer(rng: &mut Rng, input: &mut [u8], at: usize) {
    let width = 1 << rng.u32(..4);
    // Fields are aligned more often than not.
    let at = if rng.bool() { at } else { at - at % width };
    let Some(field) = input.get_mut(at..at + width) else { return };
    let mut bytes = [0; 8];
    bytes[..width].copy_from_slice(field);
    let value = match rng.u32(..3) {
        0 => INTERESTING[rng.usize(..INTERESTING.len())],
        1 => u64::from_le_bytes(bytes).wrapping_add(rng.u64(1..=16)),
        _ => u64::from_le_bytes(bytes).wrapping_sub(rng.u64(1..=16)),
    };
    field.copy_from_slice(&value.to_le_bytes()[..width]);
    if rng.u32(..4) == 0 {
        field.reverse();
    }
}

fn splice(input: &mut Vec<u8>, at: usize, remove: usize, add: &[u8]) {
    if input.len() + add.len() <= remove + MAX_INPUT_LEN {
        input.splice(at..at + remove, add.iter().copied());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sequence(seed: u64) -> Vec<Vec<u8>> {
        let mut rng = Rng::with_seed(seed);
        let corpus = vec![vec![1, 2, 3, 4, 5, 6, 7, 8], Vec::new(), vec![0; 300]];
        (0..5_000).map(|_| mutate(&mut rng, &corpus, &[b"NVMe", b""])).collect()
    }

    #[test]
    fn a_seed_gives_one_sequence_and_another_seed_another() {
        assert_eq!(sequence(7), sequence(7));
        assert_ne!(sequence(7), sequence(8));
    }

    #[test]
    fn inputs_stay_within_the_limit_and_differ() {
        let inputs = sequence(1);
        assert!(inputs.iter().all(|i| i.len() <= MAX_INPUT_LEN));
        let distinct: std::collections::BTreeSet<_> = inputs.iter().collect();
        assert!(distinct.len() > inputs.len() / 2, "{} distinct", distinct.len());
    }
}
