//! The ttrpc frame: ten bytes of header, then a payload. Pure; who reads and writes sockets
//! brings the bytes.
//!
//! Source: containerd/ttrpc `PROTOCOL.md`. Length (u32, big endian), stream id (u32, big endian,
//! odd for requests of a client), type (u8), flags (u8).

/// Bytes of a frame's header.
pub const HEADER: usize = 10;
/// Largest payload, bytes; a larger length is a protocol error.
pub const MAX_PAYLOAD: usize = 4 << 20;

/// What a frame is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Type 1.
    Request,
    /// Type 2.
    Response,
    /// Type 3, of streaming calls, which the task API does not use.
    Data,
    /// Anything else.
    Other(u8),
}

/// A frame's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Bytes of payload that follow.
    pub length: u32,
    /// Which call of the connection.
    pub stream: u32,
    /// Which type.
    pub kind: Kind,
    /// Flags; 0 for unary calls.
    pub flags: u8,
}

impl Header {
    /// Reads the header at the start of `bytes`, if all of it is there.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; HEADER] = bytes.first_chunk()?;
        let [l0, l1, l2, l3, s0, s1, s2, s3, kind, flags] = *bytes;
        Some(Self {
            length: u32::from_be_bytes([l0, l1, l2, l3]),
            stream: u32::from_be_bytes([s0, s1, s2, s3]),
            kind: match kind {
                1 => Kind::Request,
                2 => Kind::Response,
                3 => Kind::Data,
                other => Kind::Other(other),
            },
            flags,
        })
    }

    /// The header as it goes over the wire.
    pub fn bytes(&self) -> [u8; HEADER] {
        let [l0, l1, l2, l3] = self.length.to_be_bytes();
        let [s0, s1, s2, s3] = self.stream.to_be_bytes();
        let kind = match self.kind {
            Kind::Request => 1,
            Kind::Response => 2,
            Kind::Data => 3,
            Kind::Other(other) => other,
        };
        [l0, l1, l2, l3, s0, s1, s2, s3, kind, self.flags]
    }
}

/// Status codes of `google.rpc.Status` that shims answer with.
pub mod code {
    /// Success.
    pub const OK: i32 = 0;
    /// A plain error.
    pub const UNKNOWN: i32 = 2;
    /// Malformed input.
    pub const INVALID_ARGUMENT: i32 = 3;
    /// No such task, exec or process.
    pub const NOT_FOUND: i32 = 5;
    /// The id is taken.
    pub const ALREADY_EXISTS: i32 = 6;
    /// The task is not in a phase that allows it.
    pub const FAILED_PRECONDITION: i32 = 9;
    /// No such service or method.
    pub const UNIMPLEMENTED: i32 = 12;
    /// Try again.
    pub const UNAVAILABLE: i32 = 14;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_survives_the_wire_and_a_short_one_is_none() {
        let header = Header {
            length: 0x0102_0304,
            stream: 11,
            kind: Kind::Other(9),
            flags: 3,
        };
        assert_eq!(header.bytes(), [1, 2, 3, 4, 0, 0, 0, 11, 9, 3]);
        assert_eq!(Header::parse(&header.bytes()), Some(header));
        assert_eq!(Header::parse(&header.bytes()[..9]), None);
    }
}
