//! `<socket>.requests`: the requests that are here and not yet answered, so that a successor can
//! answer them on their connections. Written before a request is taken from its socket.
//!
//! ```text
//! "rcvd-rq1"  then, from byte 512 on, slots of 512 bytes:
//!             state u32 · stream u32 · inode of the socket u64 · length u32 · payload
//! ```
//!
//! A request takes the first free slot and leaves it when its answer is sent, so that the file is
//! as long as there were ever requests at once; the record is not written for them. No slot
//! crosses a page, and a write within one is done or not when its writer is killed. All numbers
//! are little-endian.
//!
//! | state | the payload is |
//! | --- | --- |
//! | 0 | nothing: the slot is free |
//! | 1 | the `ttrpc.Request` |
//! | 2 | the same without what it asks for: too long for a slot |
//! | 3 | the `ttrpc.Response`, not yet sent |
//! | 4 | nothing: a giant request is half taken from its socket |

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Read},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use recoverd_common::{failpoint, own_file};

use crate::{
    connections::{Caller, Note},
    service,
};

const MAGIC: &[u8; 8] = b"rcvd-rq1";
const SLOT: usize = 512;
const HEAD: usize = 20;
/// More requests at once are served, and lost with their shim.
const MAX_SLOTS: usize = 1024;
/// Stream of what has no stream; requests of clients have odd ones.
const NO_STREAM: u32 = 0;

const FREE: u32 = 0;
const ASKED: u32 = 1;
const CUT: u32 = 2;
const ANSWERED: u32 = 3;
const BEGUN: u32 = 4;

/// What a predecessor has left of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Left {
    /// Whose.
    pub whose: Caller,
    /// How far it was.
    pub how_far: HowFar,
}

/// How far a request was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HowFar {
    /// It was here: the `ttrpc.Request`.
    Asked(Vec<u8>),
    /// It was here, but what it asked for was not kept.
    Cut,
    /// Its answer was known: the `ttrpc.Response`.
    Answered(Vec<u8>),
    /// Half of it was taken: nobody can read this connection any more.
    Begun,
}

/// The file's writer.
#[derive(Debug)]
pub struct Requests {
    path: PathBuf,
    file: Option<File>,
    /// By slot; `true`: its answer is worth keeping.
    slots: Vec<Option<(Caller, bool)>>,
    places: BTreeMap<Caller, usize>,
}

impl Requests {
    /// A writer for `path`; nothing is touched yet.
    pub fn new(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            file: None,
            slots: Vec::new(),
            places: BTreeMap::new(),
        }
    }

    /// Begins anew, with room for a few.
    pub fn begin(&mut self) -> io::Result<()> {
        let mut options = File::options();
        options.write(true).create(true).truncate(false);
        let file = own_file::open(&mut options, &self.path)?;
        file.set_len(0)?;
        let mut page = vec![0; 8 * SLOT];
        page.splice(..MAGIC.len(), *MAGIC);
        failpoint!("requests.begin.before");
        file.write_all_at(&page, 0)?;
        failpoint!("requests.begin.after");
        *self = Self::new(&self.path);
        self.file = Some(file);
        Ok(())
    }

    /// Goes on with what a predecessor has left; gives it. An unreadable file is begun anew.
    pub fn take_over(&mut self) -> io::Result<Vec<Left>> {
        let mut options = File::options();
        let file = match own_file::open(options.read(true).write(true), &self.path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                return self.begin().map(|()| Vec::new());
            }
            Err(e) => return Err(e),
        };
        let mut bytes = Vec::new();
        (&file).take(offset(MAX_SLOTS)).read_to_end(&mut bytes)?;
        if !bytes.starts_with(MAGIC) {
            return self.begin().map(|()| Vec::new());
        }
        *self = Self::new(&self.path);
        self.file = Some(file);
        // The last slot is written as far as it is used.
        bytes.resize(bytes.len().next_multiple_of(SLOT), 0);
        let mut left = Vec::new();
        for slot in bytes.chunks_exact(SLOT).skip(1) {
            let found = parse(slot);
            let entry = found.as_ref().map(|found| {
                let keeps_answer = match &found.how_far {
                    HowFar::Asked(payload) => {
                        let parsed = service::parse(payload);
                        parsed.is_ok_and(|(call, _)| service::keeps_answer(&call))
                    }
                    HowFar::Cut | HowFar::Answered(_) => true,
                    HowFar::Begun => false,
                };
                (found.whose, keeps_answer)
            });
            if let Some((whose, _)) = entry {
                self.places.insert(whose, self.slots.len());
            }
            self.slots.push(entry);
            left.extend(found);
        }
        Ok(left)
    }

    /// Writes down what has become of a request.
    pub fn note(&mut self, note: &Note) -> io::Result<()> {
        match note {
            Note::Asked {
                from,
                payload,
                keeps_answer,
            } => {
                if HEAD + payload.len() <= SLOT {
                    self.put(*from, *keeps_answer, ASKED, payload)
                } else {
                    self.put(*from, *keeps_answer, CUT, &[])
                }
            }
            Note::Answered { to, payload } => match self.places.get(to) {
                Some(at) if HEAD + payload.len() <= SLOT => {
                    match self.slots.get(*at).copied().flatten() {
                        Some((_, true)) => self.put(*to, true, ANSWERED, payload),
                        Some((_, false)) | None => Ok(()),
                    }
                }
                Some(_) | None => Ok(()),
            },
            Note::Sent(whose) => self.free(*whose),
            Note::Closed(connection) => {
                let first = Caller {
                    connection: *connection,
                    stream: NO_STREAM,
                };
                let last = Caller {
                    connection: *connection,
                    stream: u32::MAX,
                };
                let all: Vec<_> = self.places.range(first..=last).map(|(c, _)| *c).collect();
                all.into_iter().try_for_each(|whose| self.free(whose))
            }
        }
    }

    /// A giant request is taken piece by piece from now on, until it is [noted](Self::note).
    pub fn begun(&mut self, connection: u64) -> io::Result<()> {
        let whose = Caller {
            connection,
            stream: NO_STREAM,
        };
        if self.places.contains_key(&whose) {
            return Ok(());
        }
        self.put(whose, false, BEGUN, &[])
    }

    /// It is here.
    pub fn whole(&mut self, connection: u64) -> io::Result<()> {
        self.free(Caller {
            connection,
            stream: NO_STREAM,
        })
    }

    fn put(
        &mut self,
        whose: Caller,
        keeps_answer: bool,
        state: u32,
        payload: &[u8],
    ) -> io::Result<()> {
        let at = match self.places.get(&whose) {
            Some(at) => *at,
            None => match self.slots.iter().position(Option::is_none) {
                Some(at) => at,
                None if self.slots.len() < MAX_SLOTS => {
                    self.slots.push(None);
                    self.slots.len() - 1
                }
                None => return Err(io::ErrorKind::QuotaExceeded.into()),
            },
        };
        let mut bytes = Vec::with_capacity(HEAD + payload.len());
        bytes.extend_from_slice(&state.to_le_bytes());
        bytes.extend_from_slice(&whose.stream.to_le_bytes());
        bytes.extend_from_slice(&whose.connection.to_le_bytes());
        bytes.extend_from_slice(&u32::try_from(payload.len()).unwrap_or(0).to_le_bytes());
        bytes.extend_from_slice(payload);
        failpoint!("requests.put.before");
        self.file()?.write_all_at(&bytes, offset(at))?;
        failpoint!("requests.put.after");
        if let Some(slot) = self.slots.get_mut(at) {
            *slot = Some((whose, keeps_answer));
        }
        self.places.insert(whose, at);
        Ok(())
    }

    fn free(&mut self, whose: Caller) -> io::Result<()> {
        let Some(at) = self.places.remove(&whose) else {
            return Ok(());
        };
        if let Some(slot) = self.slots.get_mut(at) {
            *slot = None;
        }
        failpoint!("requests.free.before");
        self.file()?.write_all_at(&FREE.to_le_bytes(), offset(at))?;
        failpoint!("requests.free.after");
        Ok(())
    }

    fn file(&self) -> io::Result<&File> {
        let file = self.file.as_ref();
        file.ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

/// Where a slot begins; the first place is the file's head.
fn offset(at: usize) -> u64 {
    u64::try_from(at.saturating_add(1).saturating_mul(SLOT)).unwrap_or(u64::MAX)
}

/// None: free, or nothing that we have written.
fn parse(slot: &[u8]) -> Option<Left> {
    let (state, rest) = slot.split_first_chunk::<4>()?;
    let (stream, rest) = rest.split_first_chunk::<4>()?;
    let (connection, rest) = rest.split_first_chunk::<8>()?;
    let (length, rest) = rest.split_first_chunk::<4>()?;
    let length = usize::try_from(u32::from_le_bytes(*length)).ok()?;
    let payload = rest.get(..length)?.to_vec();
    let how_far = match u32::from_le_bytes(*state) {
        ASKED => HowFar::Asked(payload),
        CUT => HowFar::Cut,
        ANSWERED => HowFar::Answered(payload),
        BEGUN => HowFar::Begun,
        _ => return None,
    };
    Some(Left {
        whose: Caller {
            connection: u64::from_le_bytes(*connection),
            stream: u32::from_le_bytes(*stream),
        },
        how_far,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn whose(connection: u64, stream: u32) -> Caller {
        Caller { connection, stream }
    }

    fn asked(from: Caller, length: usize, keeps_answer: bool) -> Note {
        Note::Asked {
            from,
            payload: vec![7; length],
            keeps_answer,
        }
    }

    fn read(path: &Path) -> Vec<Left> {
        Requests::new(path).take_over().unwrap()
    }

    #[test]
    fn what_is_not_answered_is_read_back_and_slots_are_used_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.requests");
        let mut requests = Requests::new(&path);
        requests.begin().unwrap();
        assert_eq!(fs::metadata(&path).unwrap().len(), 4096);
        for stream in [1, 3, 5, 7, 9, 11, 13, 15] {
            requests.note(&asked(whose(70, stream), 100, true)).unwrap();
        }
        assert_eq!(fs::metadata(&path).unwrap().len(), 8 * 512 + 120);
        let answered = |to, length| Note::Answered {
            to,
            payload: vec![8; length],
        };
        requests.note(&Note::Sent(whose(70, 3))).unwrap();
        requests.note(&asked(whose(71, 1), 493, true)).unwrap();
        requests.note(&answered(whose(71, 1), 493)).unwrap();
        requests.note(&answered(whose(70, 5), 4)).unwrap();
        requests.note(&Note::Closed(70)).unwrap();
        requests.note(&asked(whose(71, 3), 492, false)).unwrap();
        requests.note(&answered(whose(71, 3), 4)).unwrap();
        requests.note(&asked(whose(71, 5), 9, true)).unwrap();
        requests.note(&answered(whose(71, 5), 4)).unwrap();
        requests.begun(72).unwrap();
        // Of nobody.
        requests.note(&answered(whose(9, 9), 4)).unwrap();
        requests.note(&Note::Sent(whose(9, 9))).unwrap();
        let left = |whose, how_far| Left { whose, how_far };
        let mut found = read(&path);
        found.sort_by_key(|left| left.whose);
        let expected = [
            left(whose(71, 1), HowFar::Cut),
            left(whose(71, 3), HowFar::Asked(vec![7; 492])),
            left(whose(71, 5), HowFar::Answered(vec![8; 4])),
            left(whose(72, 0), HowFar::Begun),
        ];
        assert_eq!(found, expected);
        // A successor goes on where its predecessor was.
        let mut next = Requests::new(&path);
        next.take_over().unwrap();
        next.whole(72).unwrap();
        next.note(&Note::Sent(whose(71, 1))).unwrap();
        next.note(&Note::Sent(whose(71, 3))).unwrap();
        assert_eq!(read(&path), expected[2..3]);
    }

    #[test]
    fn what_is_no_file_of_ours_is_begun_anew_and_no_link_is_followed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.requests");
        assert_eq!(read(&path), []);
        for bytes in [&b""[..], b"x", &[0xff; 3000], b"rcvd-rq1", b"rcvd-rq9"] {
            fs::write(&path, bytes).unwrap();
            assert_eq!(read(&path), [], "{bytes:?}");
            let mut requests = Requests::new(&path);
            requests.take_over().unwrap();
            requests.note(&asked(whose(1, 1), 1, false)).unwrap();
            assert_eq!(read(&path).len(), 1);
        }
        // Slots with any bytes are no slots.
        let mut bytes = fs::read(&path).unwrap();
        bytes.resize(4096, 0);
        bytes[512..].fill(0xff);
        fs::write(&path, bytes).unwrap();
        assert_eq!(read(&path), []);
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(Requests::new(&link).begin().is_err());
        assert!(Requests::new(&link).take_over().is_err());
    }

    #[test]
    fn too_many_at_once_are_refused_and_harm_nobody() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.requests");
        let mut requests = Requests::new(&path);
        requests.begin().unwrap();
        let over = (0u32..).find(|number| {
            let note = asked(whose(1, number * 2 + 1), 1, false);
            requests.note(&note).is_err()
        });
        assert_eq!(over, Some(1024));
        requests.note(&Note::Closed(1)).unwrap();
        requests.note(&asked(whose(2, 1), 1, false)).unwrap();
        assert_eq!(read(&path).len(), 1);
    }
}
