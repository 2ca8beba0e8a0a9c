//! The log of events, written by hand.

/// An entry of the log of events, as a shim writes it.
pub fn logged(number: u64, payload: &[u8]) -> Vec<u8> {
    let step = |sum: u32, byte: &u8| (sum ^ u32::from(*byte)).wrapping_mul(0x0100_0193);
    let sum = number.to_le_bytes().iter().fold(0x811c_9dc5, step);
    let sum = payload.iter().fold(sum, step);
    let mut entry = u32::try_from(payload.len()).unwrap().to_le_bytes().to_vec();
    entry.extend(sum.to_le_bytes());
    entry.extend(number.to_le_bytes());
    entry.extend(0u32.to_le_bytes());
    entry.extend(payload);
    entry.resize(20 + payload.len().next_multiple_of(8), 0);
    entry
}
