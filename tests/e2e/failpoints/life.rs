//! The life of a pod, call by call: what was asked for, what was answered, and so what has to be
//! true after whoever served it has died, at whatever instant. It goes on from there to its end.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use prost_types::Any;
use recoverd_common::pb::runc::Options;
use recoverd_common::record::Exit;
use recoverd_tests::{
    Api, Armed, Code, Process, Reader, Refused, Sent, Status, Stdio, make_fifo, oci_process,
    oci_spec, record_at, runc_options, wait_for,
};
use serde_json::json;

use crate::ground::{Ground, NAMESPACE};

/// For the last events to come.
const EVENTS: Duration = Duration::from_secs(120);
/// `O_NONBLOCK`.
const NONBLOCK: i32 = 0o4000;
/// Of the exec that ends by itself.
const WORDS: &str = "last-words";
const BETWEEN_LOOKS: Duration = Duration::from_millis(20);

/// Somebody has died at the armed point.
#[derive(Debug)]
pub struct Died;

/// How far a task or an exec is. Those in -ing were asked for and not answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    Nothing,
    Creating,
    Created,
    Starting,
    Started,
    Ending,
    Ended,
    Deleting,
    Deleted,
}

/// How it comes to end.
enum Ends {
    ByItself,
    /// When the file of this name is there.
    Told(String),
    Killed,
}

/// A task's init or an exec.
struct Member {
    id: String,
    exec_id: String,
    line: String,
    ends: Ends,
    status: u32,
    stage: Stage,
    process: Option<Process>,
    /// It ended while nobody looked.
    unknown: bool,
    /// Its shim died of deleting it: containerd has cleaned up, and tells of that itself.
    cleaned: bool,
    stream: Option<Stream>,
    words: Option<Words>,
}

/// A line on a fifo that a client has open and does not read: it may be lost with whoever was to
/// carry it on, but it is to end with its writer.
struct Words {
    path: PathBuf,
    unread: File,
}

/// Numbered lines on a fifo of which the client keeps an end, as containerd's do.
struct Stream {
    path: PathBuf,
    count: String,
    reader: Reader,
    /// A write end of the client's own: no shim's death is seen.
    kept: Option<File>,
}

/// What is done next.
#[derive(Clone, Copy)]
pub enum Goal {
    To(Who, Stage),
    Pause,
    Resume,
    /// containerd is stopped while two of them end: their events wait.
    Backlog,
}

/// The pod's processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Who {
    /// Writes, is told to end.
    First,
    /// An exec in it that does the same.
    Session,
    /// An exec that ends by itself.
    Short,
    /// The other container, killed in the end.
    Second,
}

const ALL: [Who; 4] = [Who::First, Who::Session, Who::Short, Who::Second];

/// All of it.
pub const WHOLE: [Goal; 19] = [
    Goal::To(Who::First, Stage::Created),
    Goal::To(Who::First, Stage::Started),
    Goal::To(Who::Session, Stage::Created),
    Goal::To(Who::Session, Stage::Started),
    Goal::To(Who::Short, Stage::Created),
    Goal::To(Who::Short, Stage::Started),
    Goal::To(Who::Short, Stage::Ended),
    Goal::To(Who::Short, Stage::Deleted),
    Goal::Pause,
    Goal::Resume,
    Goal::To(Who::Second, Stage::Created),
    Goal::To(Who::Second, Stage::Started),
    Goal::Backlog,
    Goal::To(Who::Session, Stage::Ended),
    Goal::To(Who::Session, Stage::Deleted),
    Goal::To(Who::Second, Stage::Ended),
    Goal::To(Who::Second, Stage::Deleted),
    Goal::To(Who::First, Stage::Ended),
    Goal::To(Who::First, Stage::Deleted),
];

/// Until everything runs.
pub const RUNNING: [Goal; 3] = [
    Goal::To(Who::First, Stage::Started),
    Goal::To(Who::Session, Stage::Started),
    Goal::To(Who::Second, Stage::Started),
];

pub struct Life {
    round: String,
    members: Vec<Member>,
    containers: Vec<String>,
    paused: bool,
    runtime: PathBuf,
    options: Option<Any>,
    /// Pause and Resume were answered.
    thawed: bool,
    sees_ends: bool,
}

/// As `numbers` of the harness, slower: many of these run beside each other.
fn writer(go: &str, stop: &str, count: &str) -> String {
    format!(
        "n=0; while [ ! -e /mnt/{stop} ]; do n=$((n+1)); echo $n; \
         [ $((n % 10)) -ne 0 ] || usleep 10000; done; echo $n >/mnt/{count}; \
         while [ ! -e /mnt/{go} ]; do usleep 20000; done"
    )
}

impl Words {
    #[track_caller]
    fn assert_end(mut self) {
        let mut bytes = Vec::new();
        wait_for("the end of what nobody read", || {
            // Of each try, what came before there was no more for now stays.
            let ended = self.unread.read_to_end(&mut bytes);
            ended.is_ok().then_some(())
        });
        let text = String::from_utf8_lossy(&bytes);
        assert!(text.is_empty() || text == format!("{WORDS}\n"), "{text:?}");
    }
}

impl Life {
    /// Nothing is made yet.
    #[track_caller]
    pub fn new(ground: &mut Ground) -> Life {
        let round = ground.round();
        let first = format!("{round}-first");
        let member = |id: &str, exec_id: &str, line: String, ends: Ends, status: u32| Member {
            id: id.into(),
            exec_id: exec_id.into(),
            line,
            ends,
            status,
            stage: Stage::Nothing,
            process: None,
            unknown: false,
            cleaned: false,
            stream: None,
            words: None,
        };
        let told = |name: &str, status: u32| {
            let end = format!("{round}-{name}-end");
            let lines = writer(&end, &format!("{round}-stop"), &format!("{round}-{name}"));
            (format!("{lines}; exit {status}"), Ends::Told(end))
        };
        let ((init, init_ends), (session, session_ends)) = (told("init", 23), told("session", 7));
        let mut members = vec![
            member(&first, "", init, init_ends, 23),
            member(&first, "session", session, session_ends, 7),
            member(
                &first,
                "short",
                format!("echo {WORDS}; exit 5"),
                Ends::ByItself,
                5,
            ),
            member(
                &format!("{round}-second"),
                "",
                "while :; do sleep 1000; done".into(),
                Ends::Killed,
                137,
            ),
        ];
        for (who, name) in [(Who::First, "init"), (Who::Session, "session")] {
            let path = make_fifo(&ground.node, &format!("{round}-{name}-stdout"));
            let kept = File::options().read(true).write(true).open(&path);
            let kept = kept.unwrap_or_else(|error| panic!("open {}: {error}", path.display()));
            members[who as usize].stream = Some(Stream {
                reader: Reader::open(&path),
                path,
                count: format!("{round}-{name}"),
                kept: Some(kept),
            });
        }
        let path = make_fifo(&ground.node, &format!("{round}-short-stdout"));
        let unread = File::options()
            .read(true)
            .custom_flags(NONBLOCK)
            .open(&path);
        let unread = unread.unwrap_or_else(|error| panic!("open {}: {error}", path.display()));
        members[Who::Short as usize].words = Some(Words { path, unread });
        Life {
            round,
            members,
            containers: Vec::new(),
            paused: false,
            runtime: ground.shim.clone(),
            options: None,
            thawed: false,
            sees_ends: false,
        }
    }

    fn member(&mut self, who: Who) -> &mut Member {
        &mut self.members[who as usize]
    }

    /// The client of the session has no write end of its stream as soon as that runs: it would see the
    /// end if nobody else had one.
    pub fn sees_ends(&mut self) {
        self.sees_ends = true;
        self.let_see(Who::Session);
    }

    fn let_see(&mut self, who: Who) {
        if self.sees_ends
            && who == Who::Session
            && self.stage(who) >= Stage::Started
            && let Some(stream) = &mut self.member(who).stream
        {
            stream.kept = None;
        }
    }

    /// The stage of one of them.
    pub fn stage(&self, who: Who) -> Stage {
        self.members[who as usize].stage
    }

    /// The id of a task.
    pub fn id(&self, who: Who) -> &str {
        &self.members[who as usize].id
    }

    /// The process of a member that was created.
    #[track_caller]
    pub fn process(&self, who: Who) -> &Process {
        let process = self.members[who as usize].process.as_ref();
        process.unwrap_or_else(|| panic!("{who:?} has no process"))
    }

    /// Where its shim is to be found.
    pub fn socket(&self, ground: &Ground) -> PathBuf {
        let folder = recoverd_common::paths::SOCKET_DIR.as_ref();
        let address = ground.containerd.address().display().to_string();
        recoverd_common::paths::socket(folder, &address, NAMESPACE, self.id(Who::First))
    }

    /// The shim that serves the pod.
    #[track_caller]
    pub fn shim(&self, ground: &Ground) -> Process {
        let pid = record_at(&ground.node, &self.socket(ground))
            .shim
            .process
            .pid;
        let shim = ground.node.process(pid);
        shim.unwrap_or_else(|| panic!("the record's shim {pid} is not there"))
    }

    /// Calls that were not answered when somebody died: for those nothing is promised but that
    /// they were done or not.
    pub fn in_flight(&self) -> bool {
        self.members.iter().any(|member| {
            matches!(
                member.stage,
                Stage::Creating | Stage::Starting | Stage::Ending | Stage::Deleting
            )
        })
    }

    /// Makes the containers, which are containerd's own matter.
    fn container(&mut self, ground: &mut Ground, who: Who) {
        let id = self.member(who).id.clone();
        if self.containers.contains(&id) {
            return;
        }
        let line = self.member(who).line.clone();
        let mut spec = oci_spec(&id, &["sh", "-c", &line]);
        spec["annotations"] = json!({"io.containerd.runc.v2.group": self.id(Who::First)});
        let shared = json!({
            "type": "bind", "source": ground.node.folder(), "destination": "/mnt",
            "options": ["rbind", "rw"],
        });
        if let Some(mounts) = spec["mounts"].as_array_mut() {
            mounts.push(shared);
        }
        let runtime = self.runtime.clone();
        let options = self.options.clone();
        ground.api().container_on(&id, &spec, &runtime, options);
        self.containers.push(id);
    }

    /// Its containers have this shim.
    pub fn shim_binary(&mut self, path: &Path) {
        self.runtime = path.to_owned();
    }

    /// Its containers have this runtime instead of runc.
    pub fn runtime_binary(&mut self, path: &Path) {
        self.options = Some(runc_options(&Options {
            binary_name: path.display().to_string(),
            ..Options::default()
        }));
    }

    /// Makes the next call for one of them, which containerd and the shim do not outlive.
    #[track_caller]
    pub fn die_during(&mut self, ground: &mut Ground, who: Who, reached: &Path) {
        let (id, exec_id) = {
            let member = self.member(who);
            (member.id.clone(), member.exec_id.clone())
        };
        let (stdio, stage, socket) = (self.stdio(who), self.stage(who), self.socket(ground));
        if stage == Stage::Nothing {
            self.container(ground, who);
        }
        let next = match stage {
            Stage::Nothing | Stage::Creating => Stage::Creating,
            Stage::Created | Stage::Starting => Stage::Starting,
            Stage::Started | Stage::Ending => Stage::Ending,
            Stage::Ended | Stage::Deleting | Stage::Deleted => Stage::Deleting,
        };
        self.member(who).stage = next;
        let call = |api: &Api| {
            // Nobody answers.
            match next {
                Stage::Creating => drop(api.create(&id, &stdio)),
                Stage::Starting => drop(api.start(&id, &exec_id)),
                // A plain one is a signal, and no command of the runtime's.
                Stage::Ending => drop(api.kill_all(&id, 9)),
                _ => drop(api.delete(&id, &exec_id)),
            }
        };
        ground.kill_during(call, reached, &socket);
    }

    /// Works off `goals`; stops when somebody has died at `armed`.
    #[track_caller]
    pub fn run(
        &mut self,
        ground: &mut Ground,
        goals: &[Goal],
        armed: Option<&Armed>,
    ) -> Result<(), Died> {
        for goal in goals {
            match *goal {
                Goal::To(who, stage) => self.advance(ground, who, stage, armed)?,
                Goal::Pause if self.stage(Who::First) == Stage::Started => {
                    let id = self.id(Who::First).to_owned();
                    self.paused = true;
                    let answer = ground.api().pause(&id);
                    self.answered(ground, answer, armed)?;
                }
                Goal::Resume if self.paused => {
                    let id = self.id(Who::First).to_owned();
                    let answer = ground.api().resume(&id);
                    self.answered(ground, answer, armed)?;
                    self.paused = false;
                    self.thawed = true;
                }
                Goal::Backlog
                    if self.stage(Who::Session) == Stage::Started
                        && self.stage(Who::Second) == Stage::Started =>
                {
                    self.backlog(ground, armed)?;
                }
                Goal::Pause | Goal::Resume | Goal::Backlog => {}
            }
        }
        Ok(())
    }

    #[track_caller]
    fn backlog(&mut self, ground: &Ground, armed: Option<&Armed>) -> Result<(), Died> {
        self.answered(ground, Ok(()), armed)?;
        ground.containerd.freeze();
        for who in [Who::Session, Who::Second] {
            self.member(who).stage = Stage::Ending;
        }
        ground.node.kill(self.process(Who::Second));
        ground.node.tell(&format!("{}-stop", self.round));
        ground.node.tell(&format!("{}-session-end", self.round));
        wait_for("two exits on record", || {
            if armed.is_some_and(|armed| armed.was_hit(&ground.node)) {
                return Some(());
            }
            let ended = |who| self.recorded(ground, who).is_some();
            (ended(Who::Session) && ended(Who::Second)).then_some(())
        });
        ground.containerd.thaw();
        self.answered(ground, Ok(()), armed)
    }

    #[track_caller]
    fn answered<T>(
        &self,
        ground: &Ground,
        answer: Result<T, Refused>,
        armed: Option<&Armed>,
    ) -> Result<T, Died> {
        match (
            answer,
            armed.is_some_and(|armed| armed.was_hit(&ground.node)),
        ) {
            (_, true) => Err(Died),
            (Ok(answer), false) => Ok(answer),
            (Err(refused), false) => panic!("{}: nobody has died, but {refused:?}", self.round),
        }
    }

    #[track_caller]
    fn advance(
        &mut self,
        ground: &mut Ground,
        who: Who,
        goal: Stage,
        armed: Option<&Armed>,
    ) -> Result<(), Died> {
        while self.stage(who) < goal {
            let (id, exec_id) = {
                let member = self.member(who);
                (member.id.clone(), member.exec_id.clone())
            };
            let stage = self.stage(who);
            match stage {
                Stage::Nothing | Stage::Creating => {
                    let stdio = self.stdio(who);
                    let line = self.member(who).line.clone();
                    let task = exec_id.is_empty();
                    if task {
                        self.container(ground, who);
                    }
                    self.member(who).stage = Stage::Creating;
                    let api = ground.api();
                    let answer = match task {
                        true => api.create(&id, &stdio),
                        false => {
                            let process = oci_process(&["sh", "-c", &line]);
                            api.exec(&id, &exec_id, &process, &stdio).map(|()| 0)
                        }
                    };
                    if let Ok(pid @ 1..) = answer {
                        self.member(who).process = ground.node.process(pid);
                    }
                    let created = answer.is_ok();
                    if created {
                        self.member(who).stage = Stage::Created;
                    }
                    self.answered(ground, answer, armed)?;
                }
                Stage::Created | Stage::Starting => {
                    self.member(who).stage = Stage::Starting;
                    let answer = ground.api().start(&id, &exec_id);
                    if let Ok(pid) = answer {
                        self.member(who).process = ground.node.process(pid);
                        self.member(who).stage = Stage::Started;
                        self.let_see(who);
                    }
                    self.answered(ground, answer, armed)?;
                }
                Stage::Started | Stage::Ending => {
                    self.member(who).stage = Stage::Ending;
                    self.end(ground, who, armed)?;
                    let answer = ground.api().wait(&id, &exec_id);
                    if let Ok(ended) = &answer {
                        self.member(who).stage = Stage::Ended;
                        if armed.is_some_and(|armed| armed.was_hit(&ground.node)) {
                            // A successor's answer, about an end that its predecessor has seen
                            // and nobody else had yet looked for.
                            self.member(who).unknown = self.is_unknown(ground, who);
                        }
                        self.assert_status(ground, who, ended.status);
                    }
                    self.answered(ground, answer, armed)?;
                }
                Stage::Ended | Stage::Deleting => {
                    self.member(who).stage = Stage::Deleting;
                    let answer = ground.api().delete(&id, &exec_id);
                    if let Ok(ended) = &answer {
                        self.assert_status(ground, who, ended.status);
                        self.member(who).stage = Stage::Deleted;
                    }
                    self.answered(ground, answer, armed)?;
                }
                Stage::Deleted => {}
            }
        }
        Ok(())
    }

    #[track_caller]
    fn end(&mut self, ground: &mut Ground, who: Who, armed: Option<&Armed>) -> Result<(), Died> {
        let id = self.member(who).id.clone();
        match &self.member(who).ends {
            Ends::ByItself => Ok(()),
            Ends::Told(file) => {
                let file = file.clone();
                if who == Who::First {
                    // A signal that does nothing, by the way that all go.
                    let answer = match ground.api().kill(&id, "", 18) {
                        // It was told by the call that nobody answered.
                        Err(refused) if refused.code == Code::NotFound => Ok(()),
                        other => other,
                    };
                    self.answered(ground, answer, armed)?;
                }
                // Both writers stop, and the last numbers come.
                ground.node.tell(&format!("{}-stop", self.round));
                ground.node.tell(&file);
                Ok(())
            }
            Ends::Killed => {
                let answer = match ground.api().kill(&id, "", 9) {
                    // It was killed by the call that nobody answered.
                    Err(refused) if refused.code == Code::NotFound => Ok(()),
                    other => other,
                };
                self.answered(ground, answer, armed)
            }
        }
    }

    fn stdio(&self, who: Who) -> Stdio {
        let member = &self.members[who as usize];
        let stream = member.stream.as_ref().map(|stream| &stream.path);
        let path = stream.or(member.words.as_ref().map(|words| &words.path));
        Stdio {
            stdout: path.map_or_else(String::new, |path| path.display().to_string()),
            ..Stdio::default()
        }
    }

    /// The true status; or a stand-in, if it is recorded as one and nobody could see the end.
    #[track_caller]
    fn assert_status(&mut self, ground: &Ground, who: Who, status: u32) {
        let member = &self.members[who as usize];
        if status == member.status && !member.unknown {
            return;
        }
        assert!(
            member.unknown && status == 137,
            "{} {:?} ended with {status}, not {}; {:?}",
            member.id,
            member.exec_id,
            member.status,
            self.recorded(ground, who),
        );
    }

    fn is_unknown(&self, ground: &Ground, who: Who) -> bool {
        matches!(self.recorded(ground, who), Some(Exit::Unknown { .. }))
    }

    fn recorded(&self, ground: &Ground, who: Who) -> Option<Exit> {
        let member = &self.members[who as usize];
        let record = record_at(&ground.node, &self.socket(ground));
        let task = record.tasks.into_iter().find(|task| task.id == member.id)?;
        match member.exec_id.as_str() {
            "" => task.exit,
            exec_id => task.execs.into_iter().find(|e| e.id == exec_id)?.exit,
        }
    }

    /// containerd runs again: fails unless everything is as it was answered before somebody died.
    #[track_caller]
    pub fn check(&mut self, ground: &mut Ground) {
        for who in ALL {
            self.check_one(ground, who);
        }
        let first = self.id(Who::First).to_owned();
        if self.stage(Who::First) == Stage::Started
            && ground.api().phase(&first, "") == Status::Paused
        {
            assert!(self.paused, "{first} is paused, and nobody wanted that");
            let resumed = ground.api().resume(&first);
            resumed.unwrap_or_else(|refused| panic!("resume {first}: {refused:?}"));
        }
        self.paused = false;
        for who in [Who::First, Who::Session] {
            let running = self.stage(who) == Stage::Started;
            let told = ground.node.folder().join(format!("{}-stop", self.round));
            if let Some(stream) = self.members[who as usize].stream.as_ref()
                && running
                && !told.exists()
            {
                stream.reader.wait_advance();
            }
        }
        // It is not only there: it works, until it is told to end.
        let told = match &self.members[Who::First as usize].ends {
            Ends::Told(file) => ground.node.folder().join(file).exists(),
            Ends::ByItself | Ends::Killed => false,
        };
        if self.stage(Who::First) == Stage::Started && !told {
            let process = oci_process(&["sh", "-c", "exit 3"]);
            let api = ground.api();
            let pid = api.run_exec(&first, "again", &process, &Stdio::default());
            assert_eq!(api.status(&first, "again"), 3, "exec {pid}");
            let deleted = api.delete(&first, "again");
            deleted.unwrap_or_else(|refused| panic!("delete exec: {refused:?}"));
        }
    }

    #[track_caller]
    fn check_one(&mut self, ground: &mut Ground, who: Who) {
        let member = &self.members[who as usize];
        let (id, exec_id, stage) = (member.id.clone(), member.exec_id.clone(), member.stage);
        let label = format!("{id} {exec_id:?}, {stage:?} when somebody died");
        if stage == Stage::Nothing {
            return;
        }
        // What was told to end, or ends by itself, does so at any moment: also between an answer
        // and the look at its process. It is asked for again then.
        let may_end = stage == Stage::Ending || who == Who::Short;
        let (answer, living) = wait_for(&format!("{label}: its end, or it"), || {
            let answer = ground.api().state(&id, &exec_id);
            let Ok(state) = &answer else {
                return Some((answer, None));
            };
            let living = ground.node.process(state.pid);
            let living = living.filter(|it| ground.node.alive(it));
            let settled = match state.status() {
                // containerd waits two seconds for a shim; a successor may need longer.
                Status::Unknown => false,
                Status::Running => living.is_some() || !may_end,
                _ => true,
            };
            settled.then_some((answer, living))
        });
        let state = match answer {
            Err(refused) if refused.code == Code::NotFound => {
                // The init that a call half done has made does not stay behind either.
                let now = match stage {
                    Stage::Creating => Stage::Nothing,
                    Stage::Deleting | Stage::Deleted => Stage::Deleted,
                    // Its task is gone, and it with that.
                    _ if !exec_id.is_empty() && self.stage(Who::First) == Stage::Deleted => {
                        Stage::Deleted
                    }
                    _ => panic!("{label}: {refused:?}"),
                };
                self.member(who).stage = now;
                self.member(who).cleaned = now == Stage::Deleted;
                return;
            }
            Err(refused) => panic!("{label}: {refused:?}"),
            Ok(state) => state,
        };
        let now = match (stage, state.status()) {
            (Stage::Creating | Stage::Created | Stage::Starting, Status::Created) => Stage::Created,
            (Stage::Starting | Stage::Started | Stage::Ending, Status::Running)
            | (Stage::Started, Status::Paused) => Stage::Started,
            // An exec that ends by itself does so at any moment.
            (Stage::Starting | Stage::Started, Status::Stopped) if who == Who::Short => {
                Stage::Ended
            }
            (Stage::Ending | Stage::Ended | Stage::Deleting, Status::Stopped) => Stage::Ended,
            (_, status) => panic!("{label}: is {status:?} now"),
        };
        if now == Stage::Ended && stage != Stage::Ended {
            // Seen by the one that died, or by his successor, or by nobody.
            self.member(who).unknown = self.is_unknown(ground, who);
        }
        if now == Stage::Ended {
            self.assert_status(ground, who, state.exit_status);
        } else if now != Stage::Created || exec_id.is_empty() {
            let living = living.unwrap_or_else(|| panic!("{label}: {} does not live", state.pid));
            if let Some(before) = &self.member(who).process {
                let (before, now) = (
                    (before.pid, before.start_time),
                    (living.pid, living.start_time),
                );
                assert_eq!(before, now, "{label}: another process");
            }
            self.member(who).process = Some(living);
        }
        self.member(who).stage = now;
        self.let_see(who);
    }

    /// Everything was deleted: nothing is lost, and nothing left.
    #[track_caller]
    pub fn finish(mut self, ground: &mut Ground) {
        for who in ALL {
            assert_eq!(self.stage(who), Stage::Deleted, "{who:?}");
        }
        self.assert_streams(ground);
        self.assert_events(ground);
        for id in std::mem::take(&mut self.containers) {
            ground.api().remove_container(&id);
        }
    }

    /// Every event that an undisturbed run publishes has come, maybe more than once, in order.
    #[track_caller]
    pub fn assert_events(&self, ground: &Ground) {
        let first = [
            ("/tasks/create", Who::First),
            ("/tasks/start", Who::First),
            ("/tasks/exec-added", Who::Session),
            ("/tasks/exec-started", Who::Session),
            ("/tasks/exec-added", Who::Short),
            ("/tasks/exec-started", Who::Short),
            ("/tasks/exit", Who::Short),
            ("/tasks/exit", Who::Session),
            ("/tasks/exit", Who::First),
            ("/tasks/delete", Who::First),
        ];
        let second = ["create", "start", "exit", "delete"];
        let second = second.map(|topic| (format!("/tasks/{topic}"), Who::Second));
        let all = first.map(|(topic, who)| (topic.to_owned(), who));
        for task in [Who::First, Who::Second] {
            let id = self.id(task);
            let expected: Vec<(&str, &str)> = all
                .iter()
                .chain(&second)
                .map(|(topic, who)| (topic.as_str(), &self.members[*who as usize]))
                .filter(|(_, member)| member.id == id && member.stage != Stage::Nothing)
                .filter(|(topic, member)| *topic != "/tasks/delete" || !member.cleaned)
                .map(|(topic, member)| (topic, member.exec_id.as_str()))
                .collect();
            let place = |sent: &Sent| {
                let is_it = |(topic, exec_id): &(&str, &str)| {
                    *topic == sent.topic && *exec_id == sent.exec_id
                };
                expected.iter().position(is_it)
            };
            let thaws: &[&str] = match self.thawed && task == Who::First {
                true => &["/tasks/paused", "/tasks/resumed"],
                false => &[],
            };
            let has_all = |sent: &[Sent]| {
                let told: Vec<&Sent> = sent.iter().filter(|sent| sent.acknowledged).collect();
                let has = |at: usize| told.iter().any(|sent| place(sent) == Some(at));
                let thawed = |topic: &&str| told.iter().any(|sent| sent.topic == *topic);
                (0..expected.len()).all(has) && thaws.iter().all(thawed)
            };
            let patience = Instant::now() + EVENTS;
            while !has_all(&ground.events.of_container(id)) && Instant::now() < patience {
                sleep(BETWEEN_LOOKS);
            }
            let sent = ground.events.of_container(id);
            assert!(has_all(&sent), "of {expected:?} only {sent:#?}");
            // Whoever was not there for an exit hears of it once more, as long as its task is there.
            // What a shim has sent just before it died may be read after its successor's first
            // words, which said it again.
            let mut order: Vec<usize> = Vec::new();
            let mut newest = 0;
            for (sent, at) in sent.iter().filter_map(|sent| Some((sent, place(sent)?))) {
                let late = sent.connection < newest;
                newest = newest.max(sent.connection);
                if (late || !sent.acknowledged) && order.contains(&at) {
                    continue;
                }
                let deleted = order.last().is_some_and(|last| last + 1 == expected.len());
                let is_exit = expected
                    .get(at)
                    .is_some_and(|(topic, _)| *topic == "/tasks/exit");
                if deleted || !is_exit || !order.contains(&at) {
                    order.push(at);
                }
            }
            assert!(order.is_sorted(), "events of {id}: {sent:#?}");
        }
    }

    /// No number is lost or doubled.
    #[track_caller]
    pub fn assert_streams(&mut self, ground: &Ground) {
        for member in &mut self.members {
            if let Some(stream) = member.stream.take() {
                let count = ground.node.count_in(&stream.count);
                drop(stream.kept);
                stream.reader.finish(count);
            }
            if let Some(words) = member.words.take() {
                words.assert_end();
            }
        }
    }

    /// Its tasks are gone: so is everything else.
    #[track_caller]
    pub fn abandon(mut self, ground: &mut Ground) {
        for who in [Who::First, Who::Second] {
            let id = self.id(who).to_owned();
            let answer = ground.api().state(&id, "");
            assert!(
                matches!(&answer, Err(refused) if refused.code == Code::NotFound),
                "{id}: {answer:?}"
            );
        }
        self.members.clear();
        for id in std::mem::take(&mut self.containers) {
            ground.api().remove_container(&id);
        }
        ground.assert_restored();
    }

    /// The bundle of a task.
    pub fn bundle(&self, ground: &Ground, who: Who) -> PathBuf {
        let tasks = ground
            .containerd
            .state()
            .join("io.containerd.runtime.v2.task");
        tasks.join(NAMESPACE).join(self.id(who))
    }
}
