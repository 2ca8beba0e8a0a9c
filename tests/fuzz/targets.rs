//! What is done with bytes that somebody else wrote: the body of each fuzz target, and of the test
//! that runs them on the corpus. Each may panic only if the product breaks a promise: nothing that
//! can be read is read differently the second time.

use prost::Message;
use recoverd_common::{
    adoption::{Adopted, Adoption},
    pb::ttrpc::{Request, Response},
    record::version,
    ttrpc::{HEADER, Header},
};

/// A record, as it lies on disk.
pub fn record(bytes: &[u8]) {
    if let Ok(record) = version::decode(bytes) {
        let again = version::decode(&version::encode(&record));
        assert_eq!(again.as_ref(), Ok(&record));
    }
}

/// What `recoverd` tells a successor, and what that answers.
pub fn adoption(bytes: &[u8]) {
    if let Ok(told) = Adoption::decode(bytes) {
        assert_eq!(Adoption::decode(&told.encode()), Ok(told));
    }
    if let Ok(answer) = Adopted::decode(bytes) {
        assert_eq!(Adopted::decode(&answer.encode()), Ok(answer));
    }
}

/// A ttrpc frame: its header and the message that it carries.
pub fn frame(bytes: &[u8]) {
    let Some(header) = Header::parse(bytes) else {
        return;
    };
    assert_eq!(Header::parse(&header.bytes()), Some(header));
    let payload = bytes.get(HEADER..).unwrap_or_default();
    if let Ok(request) = Request::decode(payload) {
        assert_eq!(Request::decode(&*request.encode_to_vec()), Ok(request));
    }
    if let Ok(response) = Response::decode(payload) {
        assert_eq!(Response::decode(&*response.encode_to_vec()), Ok(response));
    }
}
