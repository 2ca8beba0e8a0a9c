//! A client's ends of a task's fifos.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use crate::api::Stdio;
use crate::node::Node;
use crate::wait::wait_for;

/// The fifos of one process, in the node's folder.
pub struct Fifos {
    /// What the process is given.
    pub stdio: Stdio,
}

/// Makes a fifo in the node's folder; its path, the same inside and outside.
#[track_caller]
pub fn make_fifo(node: &Node, name: &str) -> PathBuf {
    let path = node.folder().join(name);
    node.run("mkfifo", [&path]);
    path
}

impl Fifos {
    /// For stdin, stdout and stderr; named after `name`.
    #[track_caller]
    pub fn make(node: &Node, name: &str) -> Fifos {
        let path = |stream: &str| {
            let path = make_fifo(node, &format!("{name}-{stream}"));
            path.display().to_string()
        };
        let stdio = Stdio {
            stdin: path("stdin"),
            stdout: path("stdout"),
            stderr: path("stderr"),
            terminal: false,
        };
        Fifos { stdio }
    }

    /// Where containerd's own clients make them, and by the names that they give: whoever adopts a
    /// stock shim's task finds them there. Their ends are [`Output::of`] and [`Input::of`] of
    /// [`Node::path`].
    #[track_caller]
    pub fn of_client(node: &Node, id: &str, terminal: bool) -> Fifos {
        let folder = Path::new("/run/containerd/fifo").join(id);
        let path = |stream: &str| folder.join(format!("{id}-{stream}")).display().to_string();
        let stdio = Stdio {
            stdin: path("stdin"),
            stdout: path("stdout"),
            stderr: if terminal {
                String::new()
            } else {
                path("stderr")
            },
            terminal,
        };
        node.shell(&format!(
            "mkdir -p {}; mkfifo {} {} {}",
            folder.display(),
            stdio.stdin,
            stdio.stdout,
            stdio.stderr
        ));
        Fifos { stdio }
    }

    /// For a terminal: stdin and stdout only.
    #[track_caller]
    pub fn make_terminal(node: &Node, name: &str) -> Fifos {
        let mut fifos = Fifos::make(node, name);
        fifos.stdio.stderr.clear();
        fifos.stdio.terminal = true;
        fifos
    }

    /// Reads stdout from now on.
    pub fn stdout(&self) -> Output {
        Output::of(Path::new(&self.stdio.stdout))
    }

    /// Reads stderr from now on.
    pub fn stderr(&self) -> Output {
        Output::of(Path::new(&self.stdio.stderr))
    }

    /// The client's end of stdin; the task must have been created.
    #[track_caller]
    pub fn stdin(&self) -> Input {
        Input::of(Path::new(&self.stdio.stdin))
    }
}

/// Reads a fifo in a thread of its own until its last writer is gone.
pub struct Output {
    path: PathBuf,
    bytes: Arc<Mutex<Vec<u8>>>,
    reader: JoinHandle<()>,
}

impl Output {
    /// Waits for a writer first, in that thread.
    pub fn of(path: &Path) -> Output {
        let bytes = Arc::new(Mutex::new(Vec::new()));
        let (path, collected) = (path.to_owned(), Arc::clone(&bytes));
        let reader = std::thread::spawn({
            let path = path.clone();
            move || {
                let read = File::open(&path).and_then(|mut fifo| {
                    let mut buffer = vec![0; 1 << 16];
                    loop {
                        let count = fifo.read(&mut buffer)?;
                        if count == 0 {
                            return Ok(());
                        }
                        let new = buffer.get(..count).unwrap_or_default();
                        if let Ok(mut bytes) = collected.lock() {
                            bytes.extend_from_slice(new);
                        }
                    }
                });
                if let Err(error) = read {
                    panic!("read {}: {error}", path.display());
                }
            }
        });
        Output {
            path,
            bytes,
            reader,
        }
    }

    /// What came so far.
    pub fn bytes(&self) -> Vec<u8> {
        self.bytes
            .lock()
            .map(|bytes| bytes.clone())
            .unwrap_or_default()
    }

    /// The same as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes()).into_owned()
    }

    /// Whether the last writer is gone.
    pub fn has_ended(&self) -> bool {
        self.reader.is_finished()
    }

    /// Waits until these words came.
    #[track_caller]
    pub fn wait_text(&self, words: &str) {
        wait_for(&format!("{words:?} in {}", self.path.display()), || {
            self.text().contains(words).then_some(())
        });
    }

    /// Waits for the end; everything that came.
    #[track_caller]
    pub fn wait_end(&self) -> String {
        wait_for(&format!("the end of {}", self.path.display()), || {
            self.has_ended().then_some(())
        });
        self.text()
    }
}

/// The client's end of a stdin.
pub struct Input(File);

impl Input {
    /// Its reader must be there.
    #[track_caller]
    pub fn of(path: &Path) -> Input {
        let file = File::options()
            .write(true)
            .open(path)
            .unwrap_or_else(|error| panic!("open {}: {error}", path.display()));
        Input(file)
    }

    /// Writes.
    #[track_caller]
    pub fn write(&mut self, text: &str) {
        self.0
            .write_all(text.as_bytes())
            .unwrap_or_else(|error| panic!("write to a stdin: {error}"));
    }
}
