//! The fuzz targets of `tests/fuzz` on their corpus and on mutations of it: always the same ones,
//! so that a failure is there again the next time. Who has the time fuzzes for real.

use std::{
    fs,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
};

#[path = "../../tests/fuzz/targets.rs"]
mod targets;

/// Of each target; a few seconds together.
const MUTATIONS: usize = 4_000;

/// Words that parsers trip over.
const WORDS: [&[u8]; 16] = [
    b"null",
    b"-1",
    b"1e999",
    b"18446744073709551616",
    b"4294967296",
    b"\"\\u0000\"",
    b"\"\\ud800\"",
    b"[[[[[[[[[[[[[[[[",
    b"{\"format\":1,",
    b"\"format\":2,",
    b"\xff\xff\xff\xff",
    b"\x00\x00\x00\x00",
    b"\xc3\x28",
    b"}",
    b"]",
    b"\"",
];

/// xorshift64*: small, and the same everywhere.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let high = (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize;
        high % sides.max(1)
    }

    fn mutate(&mut self, mut bytes: Vec<u8>, other: &[u8]) -> Vec<u8> {
        for _ in 0..=self.roll(4) {
            let at = self.roll(bytes.len() + 1);
            let to = at + self.roll(bytes.len() - at + 1);
            match self.roll(7) {
                0 if at < bytes.len() => bytes[at] ^= 1 << self.roll(8),
                1 => bytes.truncate(at),
                2 => drop(bytes.drain(at..to)),
                3 => {
                    let word = WORDS[self.roll(WORDS.len())];
                    drop(bytes.splice(at..at, word.iter().copied()));
                }
                4 => {
                    let word = WORDS[self.roll(WORDS.len())];
                    let end = bytes.len().min(at + word.len());
                    drop(bytes.splice(at..end, word.iter().copied()));
                }
                5 => {
                    let twice = bytes[at..to.min(at + 256)].to_vec();
                    drop(bytes.splice(at..at, twice));
                }
                _ => {
                    let from = self.roll(other.len() + 1);
                    bytes.truncate(at);
                    bytes.extend_from_slice(&other[from..]);
                }
            }
        }
        bytes
    }
}

fn corpus(name: &str) -> Vec<(String, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fuzz/corpus");
    let mut files: Vec<(String, Vec<u8>)> = fs::read_dir(folder.join(name))
        .unwrap()
        .map(|entry| {
            let entry = entry.unwrap();
            let name = entry.file_name().to_string_lossy().into_owned();
            (name, fs::read(entry.path()).unwrap())
        })
        .collect();
    files.sort();
    assert!(!files.is_empty());
    files
}

fn run(name: &str, target: fn(&[u8])) {
    let corpus = corpus(name);
    for (file, bytes) in &corpus {
        let ran = catch_unwind(AssertUnwindSafe(|| target(bytes)));
        assert!(ran.is_ok(), "{name}: {file}");
    }
    let mut dice = Dice(0x9e37_79b9_7f4a_7c15);
    for round in 0..MUTATIONS {
        let base = corpus[dice.roll(corpus.len())].1.clone();
        let other = &corpus[dice.roll(corpus.len())].1;
        let bytes = dice.mutate(base, other);
        let ran = catch_unwind(AssertUnwindSafe(|| target(&bytes)));
        let shown = String::from_utf8_lossy(&bytes);
        assert!(ran.is_ok(), "{name}: mutation {round}: {shown:?}");
    }
}

#[test]
fn no_bytes_of_a_record_are_read_in_two_ways_or_break_its_reader() {
    run("record", targets::record);
}

#[test]
fn no_bytes_of_an_adoption_are_read_in_two_ways_or_break_its_reader() {
    run("adoption", targets::adoption);
}

#[test]
fn no_bytes_of_a_frame_are_read_in_two_ways_or_break_its_reader() {
    run("frame", targets::frame);
}
