//! The findings: their codes, severities and one line each. The code is one word everywhere: in
//! reports, on the command line and here.

use serde::Serialize;

/// How bad.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// A workload is lost, or will be at containerd's next start.
    Critical,
    /// Something is wrong and will not mend itself.
    Warning,
    /// Worth knowing.
    Info,
}

impl Severity {
    /// All, worst first.
    pub const ALL: [Severity; 3] = [Severity::Critical, Severity::Warning, Severity::Info];

    /// The word.
    pub fn word(self) -> &'static str {
        match self {
            Severity::Critical => "critical",
            Severity::Warning => "warning",
            Severity::Info => "info",
        }
    }
}

macro_rules! codes {
    ($($variant:ident $word:literal $severity:ident $summary:literal;)*) => {
        /// What can be found.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
        #[serde(rename_all = "kebab-case")]
        pub enum Code {
            $(#[doc = $summary] $variant,)*
        }

        impl Code {
            /// All codes, in the order of the contract.
            pub const ALL: &'static [Code] = &[$(Code::$variant,)*];

            /// The word.
            pub fn word(self) -> &'static str {
                match self { $(Code::$variant => $word,)* }
            }

            /// How bad it is.
            pub fn severity(self) -> Severity {
                match self { $(Code::$variant => Severity::$severity,)* }
            }

            /// What it is, in one line.
            pub fn summary(self) -> &'static str {
                match self { $(Code::$variant => $summary,)* }
            }
        }
    };
}

codes! {
    OrphanedTask "orphaned-task" Critical "the init lives, its shim does not";
    UnresponsiveShim "unresponsive-shim" Critical "the shim lives and accepts, but does not answer";
    DuplicateWorkload "duplicate-workload" Critical "two living inits for one container, or one in a container's cgroup that no shim owns";
    SocketMissing "socket-missing" Critical "the shim lives, its socket file is gone";
    TaskUnknownToContainerd "task-unknown-to-containerd" Warning "shim and init live, their containerd does not know the task";
    LeakedShim "leaked-shim" Warning "the shim lives without any living process, and containerd does not know it";
    StuckTask "stuck-task" Warning "containerd, shim and kernel disagree on the phase";
    ExitUnreported "exit-unreported" Warning "the task exited and nobody told containerd";
    OutdatedShim "outdated-shim" Info "the shim runs a deleted or older executable than the installed one";
    StaleBundle "stale-bundle" Warning "a bundle without init and shim";
    StaleSocket "stale-socket" Info "a socket file on which nobody listens";
    StaleRecord "stale-record" Info "a record from another boot, or without socket and process";
    UnreadableRecord "unreadable-record" Warning "a record that is corrupt, cut, from the future, or not its owner's";
    LeakedMount "leaked-mount" Warning "a mount without its task";
    LeakedCgroup "leaked-cgroup" Warning "a cgroup without its task";
    LeakedFifo "leaked-fifo" Warning "fifos without their task";
    LeakedRuncState "leaked-runc-state" Warning "runc's state of a container without its task";
    RunNearlyFull "run-nearly-full" Warning "the file system of the state folder has little room left";
    LeakedExec "leaked-exec" Info "an exec lives, nobody holds the other end of its fifos";
    BloatedShim "bloated-shim" Info "memory, threads or descriptors of the shim far beyond the usual";
    Foreign "foreign" Info "not a runc shim, or owned by an unknown containerd";
}

impl Code {
    /// From the word.
    pub fn parse(word: &str) -> Option<Code> {
        Code::ALL.iter().copied().find(|code| code.word() == word)
    }
}

/// A fact and whose word it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Evidence {
    /// `kernel`, `shim`, `containerd`, `bundle`, `runc`, `record`…
    pub by: &'static str,
    /// What it says, one line.
    pub fact: String,
}

/// What a finding is about.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(untagged)]
pub enum Subject {
    /// A task.
    Task {
        /// Containerd namespace.
        namespace: String,
        /// Its id.
        id: String,
    },
    /// A shim process.
    Shim {
        /// Its pid.
        shim: i32,
    },
    /// A file, folder, mount or cgroup.
    Path {
        /// Where.
        path: String,
    },
}

impl Subject {
    /// As people read it.
    pub fn text(&self) -> String {
        match self {
            Subject::Task { namespace, id } => format!("{namespace}/{id}"),
            Subject::Shim { shim } => format!("shim {shim}"),
            Subject::Path { path } => path.clone(),
        }
    }
}

/// One thing that was found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Which.
    pub code: Code,
    /// How bad.
    pub severity: Severity,
    /// About what.
    pub subject: Subject,
    /// Why we think so.
    pub evidence: Vec<Evidence>,
    /// The one thing to do, one line.
    pub action: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_word_printed_and_the_word_typed_are_one() {
        for code in Code::ALL {
            assert_eq!(Code::parse(code.word()), Some(*code));
            let json = serde_json::to_string(code).unwrap();
            assert_eq!(json, format!("{:?}", code.word()));
        }
        assert_eq!(Code::parse("orphaned"), None);
    }
}
