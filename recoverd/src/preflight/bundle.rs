//! One bundle, through the steps that containerd takes with it at its start.

use recoverd_common::{
    bundle::{Bootstrap, Bundle},
    seen::Seen,
};

use super::{Check, Fate, Judge, task};
use crate::{
    correlate::{Case, Init, Kind},
    facts::{Answer, Connection, Instance, Phase, Reply, address_of},
    findings::Severity,
    release::{Release, no_downgrade},
};

impl Judge<'_> {
    /// One bundle, as containerd goes through it at its start.
    pub(super) fn bundle(
        &mut self,
        instance: &Instance,
        case: &Case<'_>,
        bundle: &Bundle,
        to: Option<Release>,
    ) {
        if bundle.empty {
            return self.lost(case, Check::Bundle, Fate::Dropped, "its bundle is empty");
        }
        if !self.shim_binary(instance, case, bundle) {
            return;
        }
        let Some(address) = self.shim_address(case, bundle, to) else {
            return;
        };
        let Some(answer) = self.input.look.answers.get(&address_of(&address)) else {
            let what = format!("the shim of {}", task(&case.name.0, &case.name.1));
            return self.gap(what, format!("{address} was not asked"));
        };
        if self.greeting(case, answer) {
            self.protocol(case, bundle, answer, to);
            self.phase(case, bundle, answer, to);
        }
    }

    /// Says that a workload would be lost, if there may be one and no finding says so already.
    fn lost(&mut self, case: &Case<'_>, check: Check, fate: Fate, because: &str) {
        if self.told.contains(&case.name) {
            return;
        }
        let subject = task(&case.name.0, &case.name.1);
        let fate = match fate {
            Fate::Killed => "containerd's start kills",
            Fate::Dropped => "containerd's start drops and no longer knows",
        };
        match living(case) {
            Life::Yes => {
                let why = format!("{because}: {fate} the workload");
                self.add(Severity::Critical, check, subject, why);
            }
            Life::CannotSay(unsure) => {
                let why = format!("{because}: {fate} the workload if it is alive ({unsure})");
                self.add(Severity::Critical, check, subject, why);
            }
            Life::No => {}
        }
    }

    /// Steps 2 and 3. False when containerd goes no further.
    fn shim_binary(&mut self, instance: &Instance, case: &Case<'_>, bundle: &Bundle) -> bool {
        let what = || format!("the shim binary of {}", task(&case.name.0, &case.name.1));
        let path = match &bundle.shim_binary {
            Seen::Present(path) if path.is_absolute() => path,
            // containerd looks such a name up in a PATH that only it knows.
            Seen::Present(path) => {
                self.gap(what(), format!("{} is no absolute path", path.display()));
                return true;
            }
            Seen::Absent => return self.container_record(instance, case),
            Seen::Unknown(why) => {
                self.gap(what(), format!("shim-binary-path: {why}"));
                return true;
            }
        };
        match self.input.premises.binaries.get(path) {
            Some(Seen::Present(true)) => true,
            Some(Seen::Present(false)) => {
                let why = format!(
                    "{} is not executable: containerd can neither clean up nor reap this task",
                    path.display()
                );
                let subject = task(&case.name.0, &case.name.1);
                self.add(Severity::Warning, Check::ShimBinary, subject, why);
                true
            }
            Some(Seen::Absent) => {
                let because = format!("its shim's binary {} is gone", path.display());
                self.lost(case, Check::ShimBinary, Fate::Dropped, &because);
                false
            }
            Some(Seen::Unknown(why)) => {
                let why = format!("{}: {why}", path.display());
                self.gap(what(), why);
                true
            }
            None => {
                self.gap(what(), format!("{} was not looked at", path.display()));
                true
            }
        }
    }

    /// Without `shim-binary-path` the container's record must name the runtime.
    fn container_record(&mut self, instance: &Instance, case: &Case<'_>) -> bool {
        match instance.api.up() {
            Some(api) if api.containers.contains_key(&case.name) => true,
            Some(_) => {
                let because = "its bundle has no shim-binary-path and containerd no record of \
                               the container";
                self.lost(case, Check::ShimBinary, Fate::Dropped, because);
                false
            }
            None => {
                let what = format!("the shim binary of {}", task(&case.name.0, &case.name.1));
                let why = "its bundle has no shim-binary-path, and whether containerd has a \
                           record of the container cannot be asked";
                self.gap(what, why);
                true
            }
        }
    }

    /// Step 4: the address that containerd would connect to.
    fn shim_address(
        &mut self,
        case: &Case<'_>,
        bundle: &Bundle,
        to: Option<Release>,
    ) -> Option<String> {
        match address(bundle, to) {
            Place::At(address) => Some(address),
            Place::None(because) => {
                self.lost(case, Check::ShimAddress, Fate::Killed, &because);
                None
            }
            Place::Unreadable(why) => {
                let subject = task(&case.name.0, &case.name.1);
                self.gap(format!("the shim's address of {subject}"), why.clone());
                // Root reads what containerd reads: what is no good for us is none for it.
                if self.input.look.host.root {
                    let because = format!("its shim's address cannot be read ({why})");
                    self.lost(case, Check::ShimAddress, Fate::Killed, &because);
                }
                None
            }
        }
    }

    /// Step 5: connect, and `Connect`. False when containerd goes no further.
    fn greeting(&mut self, case: &Case<'_>, answer: &Answer) -> bool {
        let unseen = |why: String| (None, Some(why));
        let (because, gap) = match &answer.connection {
            Connection::Refused => (Some("nobody listens on its shim's socket".into()), None),
            Connection::NoFile => (Some("its shim's socket is gone".into()), None),
            Connection::QueueFull => (
                Some("its shim has not accepted connections for long".into()),
                None,
            ),
            Connection::Failed(why) => unseen(format!("connect: {why}")),
            Connection::Made => match &answer.greeting {
                Reply::Said(_) => return true,
                Reply::Error(code, text) => (
                    Some(format!(
                        "its shim answers Connect with error {code}, {text}"
                    )),
                    None,
                ),
                Reply::Silent => (Some("its shim does not answer Connect".into()), None),
                Reply::Garbage(why) => (Some(format!("its shim speaks no ttrpc ({why})")), None),
                Reply::NotAsked => unseen("was not asked".into()),
            },
        };
        if let Some(because) = because {
            self.lost(case, Check::ShimAnswer, Fate::Killed, &because);
        }
        if let Some(why) = gap {
            let what = format!("the shim of {}", task(&case.name.0, &case.name.1));
            self.gap(what, why);
        }
        false
    }

    /// Whether the containerd that is to start and the shim speak the same task API.
    fn protocol(&mut self, case: &Case<'_>, bundle: &Bundle, answer: &Answer, to: Option<Release>) {
        let Some(to) = to else { return };
        let subject = task(&case.name.0, &case.name.1);
        let kind = case.kind();
        match (answer.api, kind) {
            // Serves both.
            (_, Some(Kind::Ours)) => {}
            (None, _) => self.gap(
                format!("the task API of {subject}"),
                "its shim did not say which it speaks",
            ),
            (Some(3), Some(Kind::Stock)) if to.is_1() => {
                let because = format!("its shim speaks task API 3 only, containerd {to} speaks 2");
                self.lost(case, Check::Protocol, Fate::Killed, &because);
            }
            (Some(3), Some(Kind::Foreign) | None) if to.is_1() => self.gap(
                format!("the task API of {subject}"),
                format!(
                    "its shim answers on version 3; whether also on 2, as {to} needs, is unknown"
                ),
            ),
            (Some(2), _) if no_downgrade(to) && bundle.api_version() == Some(3) => {
                let because = format!(
                    "bootstrap.json says task API 3, its shim speaks 2, and containerd {to} may \
                     not try the other (2.0.6 and later do)"
                );
                self.lost(case, Check::Protocol, Fate::Killed, &because);
            }
            (Some(_), _) => {}
        }
    }

    /// Step 7, and what the CRI does afterwards.
    fn phase(&mut self, case: &Case<'_>, bundle: &Bundle, answer: &Answer, to: Option<Release>) {
        const NOT_FOUND: i32 = 5;
        let subject = task(&case.name.0, &case.name.1);
        // A release that nobody named may be any: judged as the less forgiving ones.
        let asks_pids = !to.is_some_and(Release::is_1_6);
        let ours = case.kind() == Some(Kind::Ours);
        match answer.states.get(&case.name.1) {
            Some(Reply::Said(state)) => match state.phase {
                Phase::Running => {}
                Phase::Stopped if asks_pids && !ours => {
                    let why = format!(
                        "it has exited with status {} and was not deleted: containerd from 1.7 \
                         on deletes it at its start, and status and events are lost",
                        state.exit_status
                    );
                    self.add(Severity::Warning, Check::Phase, subject, why);
                }
                Phase::Stopped => {}
                Phase::Paused | Phase::Pausing => {
                    let why = "it is paused: if its shim hangs over the frozen cgroup when asked \
                               for pids, containerd from 1.7 on waits for it without end; resume \
                               it first";
                    self.add(Severity::Warning, Check::Phase, subject, why);
                }
                Phase::Created if is_cri(bundle) => {
                    let why = "it is created and not started: the CRI plugin ends such a \
                               container at its start";
                    self.add(Severity::Warning, Check::Phase, subject, why);
                }
                Phase::Created => {}
                Phase::Unknown => {
                    self.gap(format!("the phase of {subject}"), "its shim says unknown");
                }
            },
            Some(Reply::Error(NOT_FOUND, _)) if asks_pids => {
                let because = "its shim answers, but does not know the task";
                self.lost(case, Check::ShimAnswer, Fate::Killed, because);
            }
            // 1.6 takes any shim that answers Connect.
            Some(Reply::Error(NOT_FOUND, _)) => {}
            Some(Reply::Error(code, text)) => {
                let why = format!("its shim answers with error {code}, {text}");
                self.gap(format!("the phase of {subject}"), why);
            }
            Some(Reply::Silent) if asks_pids => {
                if !self.told.contains(&case.name) {
                    let why = "its shim answers Connect but not State: if it does not answer Pids \
                               either, containerd from 1.7 on never finishes its start";
                    self.add(Severity::Critical, Check::ShimAnswer, subject, why);
                }
            }
            Some(Reply::Silent | Reply::NotAsked | Reply::Garbage(_)) | None => {
                self.gap(format!("the phase of {subject}"), "its shim did not say");
            }
        }
    }
}

enum Life {
    Yes,
    No,
    CannotSay(String),
}

/// Whether a case has a workload that could be lost: the kernel's word, and for shims that are
/// not runc's the shim's.
fn living(case: &Case<'_>) -> Life {
    match &case.init {
        Init::Alive(_) => Life::Yes,
        Init::Dead(..) => Life::No,
        Init::Unknown(why) => Life::CannotSay(why.clone()),
        Init::None => match case.state().map(|state| state.phase) {
            Some(Phase::Created | Phase::Running | Phase::Paused | Phase::Pausing) => Life::Yes,
            Some(Phase::Stopped) => Life::No,
            Some(Phase::Unknown) => Life::CannotSay("its shim says unknown".into()),
            // Neither runc nor a shim knows a process: nothing was created yet, or all is gone.
            None if case.shim.process().is_none() => Life::No,
            None => Life::CannotSay("nothing names its init".into()),
        },
    }
}

/// Where containerd would look for a shim.
enum Place {
    At(String),
    None(String),
    Unreadable(String),
}

/// The address that a release reads in a bundle. Without a release, what any would find.
fn address(bundle: &Bundle, to: Option<Release>) -> Place {
    let text = |release: &str| match &bundle.address {
        Seen::Present(text) if text.is_empty() => Place::None("its file address is empty".into()),
        Seen::Present(text) => Place::At(text.clone()),
        Seen::Absent => Place::None(format!(
            "its bundle has no file address, which containerd {release} needs"
        )),
        Seen::Unknown(why) => Place::Unreadable(format!("address: {why}")),
    };
    let Some(to) = to else {
        return match bundle.socket_address() {
            Some(address) => Place::At(address),
            None => match (&bundle.address, &bundle.bootstrap) {
                (Seen::Unknown(why), _) | (_, Seen::Unknown(why)) => Place::Unreadable(why.clone()),
                (Seen::Absent | Seen::Present(_), Seen::Absent | Seen::Present(_)) => {
                    Place::None("its bundle does not say where its shim listens".into())
                }
            },
        };
    };
    let json = |text: &str| serde_json::from_str::<Bootstrap>(text).ok();
    let release = to.to_string();
    if !to.is_1() {
        return match &bundle.bootstrap {
            Seen::Present(bootstrap) if bootstrap.address.is_empty() => {
                Place::None("its bootstrap.json names no address".into())
            }
            Seen::Present(bootstrap) => Place::At(bootstrap.address.clone()),
            Seen::Absent => match text(&release) {
                Place::At(text) if json(&text).is_some() => Place::None(format!(
                    "its file address holds JSON, which containerd {to} takes for a name"
                )),
                other => other,
            },
            Seen::Unknown(why) => Place::Unreadable(format!("bootstrap.json: {why}")),
        };
    }
    match text(&release) {
        Place::At(text) => match json(&text) {
            Some(_) if to.is_1_6() => Place::None(format!(
                "its file address holds JSON, which containerd {to} takes for a name"
            )),
            Some(json) if json.version > 2 => Place::None(format!(
                "its file address says version {}, which containerd {to} refuses",
                json.version
            )),
            Some(json) if json.address.is_empty() => {
                Place::None("its file address names no address".into())
            }
            Some(json) => Place::At(json.address),
            None => Place::At(text),
        },
        other => other,
    }
}

/// The container was made by the CRI plugin.
fn is_cri(bundle: &Bundle) -> bool {
    bundle.config.present().is_some_and(|config| {
        config
            .annotations
            .contains_key("io.kubernetes.cri.container-type")
    })
}
