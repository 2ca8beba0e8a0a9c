//! Reading `<socket>.events`: events that a shim accepted and containerd has not acknowledged, in
//! order. What writes it is the shim's.
//!
//! ```text
//! "rcvd-ev1"  then entries:  length u32 · sum u32 · number u64 · flags u32 · payload, zeros to 8
//! ```
//!
//! A length of zero ends it. Every entry carries a sum, so that one which was cut by a SIGKILL is
//! no entry. Behind the last one there may be room for more.

use std::{
    fs::File,
    io::{BufReader, Read},
    path::Path,
};

use crate::{own_file, read::absent_or_unknown, seen::Seen, ttrpc::MAX_PAYLOAD};

/// What it begins with.
pub const MAGIC: &[u8; 8] = b"rcvd-ev1";
/// Bytes of an entry before its payload.
pub const HEAD: usize = 20;
/// Flag: containerd has it.
pub const ACKNOWLEDGED: u32 = 1;
/// Flag: it is told twice.
pub const ECHO: u32 = 2;

/// One entry as read.
pub type Kept = (u64, bool, Vec<u8>);

/// FNV-1a over number and payload. Flags change in place and are not in it.
pub fn sum(number: u64, payload: &[u8]) -> u32 {
    let step = |sum: u32, byte: &u8| (sum ^ u32::from(*byte)).wrapping_mul(0x0100_0193);
    let sum = number.to_le_bytes().iter().fold(0x811c_9dc5, step);
    payload.iter().fold(sum, step)
}

/// The unacknowledged entries of the log at `path`, in order; up to where it is whole. Read entry
/// by entry: a night without containerd makes a log that is longer than anything we read at once.
pub fn read(path: &Path) -> Seen<Vec<Kept>> {
    begin(path).map(|mut reader| std::iter::from_fn(|| unacknowledged(&mut reader)).collect())
}

/// Whether there is one at all.
pub fn holds_any(path: &Path) -> Seen<bool> {
    begin(path).map(|mut reader| unacknowledged(&mut reader).is_some())
}

fn begin(path: &Path) -> Seen<BufReader<File>> {
    let file = match own_file::open(File::options().read(true), path) {
        Ok(file) => file,
        Err(error) => return absent_or_unknown(&error),
    };
    let mut reader = BufReader::new(file);
    let mut magic = [0; MAGIC.len()];
    if reader.read_exact(&mut magic).is_err() || magic != *MAGIC {
        return Seen::Unknown("is no log of events".to_owned());
    }
    Seen::Present(reader)
}

fn unacknowledged(reader: &mut impl Read) -> Option<Kept> {
    loop {
        let (number, flags, payload) = entry(reader)?;
        if flags & ACKNOWLEDGED == 0 {
            return Some((number, flags & ECHO != 0, payload));
        }
    }
}

/// The next entry; none at the end, and where the log is broken.
fn entry(reader: &mut impl Read) -> Option<(u64, u32, Vec<u8>)> {
    let mut head = [0; HEAD];
    reader.read_exact(&mut head).ok()?;
    let (length, rest) = head.split_first_chunk::<4>()?;
    let (stored, rest) = rest.split_first_chunk::<4>()?;
    let (number, rest) = rest.split_first_chunk::<8>()?;
    let flags = rest.first_chunk::<4>()?;
    let length = usize::try_from(u32::from_le_bytes(*length)).ok()?;
    // A longer one was never written: it would fit into no frame.
    if !(1..=MAX_PAYLOAD).contains(&length) {
        return None;
    }
    let number = u64::from_le_bytes(*number);
    let mut payload = vec![0; length];
    reader.read_exact(&mut payload).ok()?;
    if sum(number, &payload) != u32::from_le_bytes(*stored) {
        return None;
    }
    let padding = length.next_multiple_of(8).saturating_sub(length);
    let mut zeros = [0; 8];
    // Cut off, it is the last one, and whole all the same.
    let _ = reader.read_exact(zeros.get_mut(..padding)?);
    Some((number, u32::from_le_bytes(*flags), payload))
}
