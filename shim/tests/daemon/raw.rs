//! Frames by hand, where a client would never stop in the middle of one.

// Each test program uses a part of it.
#![allow(dead_code)]

use std::{
    io::{self, Read, Write},
    os::unix::net::UnixStream,
    time::Duration,
};

use prost::Message;
use recoverd_common::{
    pb::ttrpc as envelope,
    shim_client::TASK_SERVICES,
    ttrpc::{HEADER, Header, Kind},
};

/// A request to the task service.
pub fn frame(stream: u32, method: &str, request: &impl Message) -> Vec<u8> {
    let payload = envelope::Request {
        service: TASK_SERVICES[0].into(),
        method: method.into(),
        payload: request.encode_to_vec(),
        ..Default::default()
    }
    .encode_to_vec();
    let header = Header {
        length: u32::try_from(payload.len()).unwrap(),
        stream,
        kind: Kind::Request,
        flags: 0,
    };
    [&header.bytes()[..], &payload].concat()
}

/// The next frame, whole.
pub fn read_frame(stream: &mut UnixStream) -> io::Result<(Header, Vec<u8>)> {
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    let mut head = [0; HEADER];
    stream.read_exact(&mut head)?;
    let header = Header::parse(&head).unwrap();
    let mut body = vec![0; usize::try_from(header.length).unwrap()];
    stream.read_exact(&mut body)?;
    Ok((header, body))
}

/// The stream of the next answer.
pub fn answered(stream: &mut UnixStream) -> u32 {
    read_frame(stream).unwrap().0.stream
}

/// The stream of the next answer, and why it refuses.
pub fn refusal(stream: &mut UnixStream) -> (u32, String) {
    let (header, body) = read_frame(stream).unwrap();
    let response = envelope::Response::decode(body.as_slice()).unwrap();
    (header.stream, response.status.unwrap().message)
}

/// As containerd's event service: what `asked` is a frame of is taken.
pub fn acknowledge(stream: &mut UnixStream, asked: Header) -> io::Result<()> {
    let header = Header {
        length: 0,
        kind: Kind::Response,
        ..asked
    };
    stream.write_all(&header.bytes())
}
