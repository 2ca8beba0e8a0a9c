//! The containerd releases that every test runs on, and the registration of tests.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use libtest_mimic::{Arguments, Trial};

use crate::systemd_box::BoxKind;
use crate::{loop_device, newer};

/// The releases that `tests/setup` provides.
const RELEASES: [&str; 3] = ["1.6", "1.7", "2.1"];

/// One containerd release, unpacked in the cache folder of `tests/setup`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Release {
    /// `1.6`, `1.7` or `2.1`.
    pub name: &'static str,
    /// What the binary itself says, `1.6.20`.
    pub version: String,
    /// Holds `containerd`, `ctr` and `containerd-shim-runc-v2`.
    pub folder: PathBuf,
}

impl Release {
    /// The release of that name, or why it cannot be had.
    pub fn find(name: &'static str) -> Result<Release, String> {
        let folder = cache().join(format!("containerd-{name}"));
        if let Ok(why) =
            fs::read_to_string(folder.with_file_name(format!("containerd-{name}.unavailable")))
        {
            return Err(why.trim().to_owned());
        }
        match fs::read_to_string(folder.join("VERSION")) {
            Ok(version) => Ok(Release {
                name,
                version: version.trim().to_owned(),
                folder,
            }),
            Err(_) => Err(format!(
                "{} is not there: run tests/setup",
                folder.display()
            )),
        }
    }

    /// Every release that can be had, oldest first.
    pub fn available() -> Vec<Release> {
        RELEASES
            .into_iter()
            .filter_map(|name| Release::find(name).ok())
            .collect()
    }

    /// Another release than this one, for upgrades and downgrades; `None` when it cannot be had.
    pub fn other(&self, name: &'static str) -> Option<Release> {
        Release::find(name).ok()
    }

    /// The stock shim of this release.
    pub fn stock_shim(&self) -> PathBuf {
        self.folder.join("containerd-shim-runc-v2")
    }

    /// The root file system that `tests/setup` made, for what is run without [`crate::Container`].
    pub fn rootfs() -> PathBuf {
        rootfs()
    }

    /// `1` or `2`.
    pub fn major(&self) -> u32 {
        self.name
            .split('.')
            .next()
            .and_then(|major| major.parse().ok())
            .unwrap_or(0)
    }
}

/// The folder that `tests/setup` fills.
pub(crate) fn cache() -> PathBuf {
    let folder = |variable| {
        std::env::var_os(variable)
            .filter(|v| !v.is_empty())
            .map(PathBuf::from)
    };
    folder("RECOVERD_CACHE").unwrap_or_else(|| {
        folder("XDG_CACHE_HOME")
            .unwrap_or_else(|| {
                folder("HOME")
                    .unwrap_or_else(|| "/root".into())
                    .join(".cache")
            })
            .join("recoverd")
    })
}

/// The root file system that `tests/setup` made: busybox under every name it knows.
pub(crate) fn rootfs() -> PathBuf {
    cache().join("rootfs")
}

/// The same as an image archive, `localhost/NAME:latest`: `busybox`, or `pause` that sleeps.
pub(crate) fn image_archive(name: &str) -> PathBuf {
    cache().join(format!("{name}.tar"))
}

/// A binary of this workspace: beside the test's own `deps` folder, as cargo lays them out.
pub fn built(program: &str) -> PathBuf {
    let test =
        std::env::current_exe().unwrap_or_else(|error| panic!("find the test's own path: {error}"));
    let folder = test
        .parent()
        .and_then(Path::parent)
        .unwrap_or(Path::new("/nonexistent"));
    let path = folder.join(program);
    assert!(
        path.exists(),
        "{} is not built: cargo build --workspace --bins",
        path.display()
    );
    path
}

/// Whose shim a test runs its containers with: the same test on the stock one is the control.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShimUnderTest {
    /// The release's own `containerd-shim-runc-v2`.
    Stock,
    /// `containerd-shim-recoverd-v1` of this workspace.
    Recoverd,
}

impl ShimUnderTest {
    const ALL: [ShimUnderTest; 2] = [ShimUnderTest::Stock, ShimUnderTest::Recoverd];

    fn word(self) -> &'static str {
        match self {
            ShimUnderTest::Stock => "stock",
            ShimUnderTest::Recoverd => "recoverd",
        }
    }

    /// Its runtime, as `ctr run --runtime` takes it.
    pub fn runtime(self) -> PathBuf {
        match self {
            ShimUnderTest::Stock => "io.containerd.runc.v2".into(),
            ShimUnderTest::Recoverd => built("containerd-shim-recoverd-v1"),
        }
    }
}

/// A test by its name.
pub type OnRelease = (&'static str, fn(&Release));
/// A test that is told which shim to use.
pub type WithShim = (&'static str, fn(&Release, ShimUnderTest));

/// A test that needs something of the machine itself.
pub type OnMachine = (&'static str, fn());

/// Why this process is not in the first namespaces of its machine.
fn outside_of_first_namespaces() -> Option<String> {
    // Process 2 there makes the kernel's own threads, and is in all the first ones.
    let first = fs::read_to_string("/proc/2/comm").unwrap_or_default();
    let namespace = |of: &str, kind| fs::read_link(format!("/proc/{of}/ns/{kind}")).ok();
    let same = |kind| namespace("2", kind).is_some_and(|of| Some(of) == namespace("self", kind));
    let there = first == "kthreadd\n" && same("net") && same("pid");
    (!there).then(|| "not in the machine's first network and pid namespaces".to_owned())
}

/// The tests of one file.
#[derive(Default)]
pub struct Tests<'a> {
    /// Run once per release.
    pub on_every_release: &'a [OnRelease],
    /// Run once per release and shim.
    pub with_each_shim: &'a [WithShim],
    /// Run once, on the newest release that is there.
    pub once: &'a [OnRelease],
    /// Run once per shim, on the newest release that is there.
    pub once_with_each_shim: &'a [WithShim],
    /// Run once per shim, on the newest release, with a CRIU that works here.
    pub with_criu_and_each_shim: &'a [WithShim],
    /// Run once, on the newest release, with a CRIU that works here.
    pub with_criu: &'a [OnRelease],
    /// Run once per shim, on the newest release, with a runc that can map ids.
    pub with_newer_runc: &'a [WithShim],
    /// Run once per shim, on the newest release, where the machine gives loop devices.
    pub with_loop_devices: &'a [WithShim],
    /// Run once, on the newest release, with Docker.
    pub with_docker: &'a [OnRelease],
    /// Run once, each with a [`crate::SystemdBox`].
    pub in_a_box: &'a [OnMachine],
    /// Run once, each with a [`crate::SystemdBox`] and with Docker for it.
    pub docker_in_a_box: &'a [OnMachine],
    /// Run once, each in a vm of its own.
    pub in_a_vm: &'a [OnMachine],
    /// Run once, in the first network and pid namespaces of the machine.
    pub in_first_namespaces: &'a [OnMachine],
}

impl Tests<'_> {
    /// The `main` of a test file.
    ///
    /// A release that cannot be had makes its tests *ignored*, never passed; `tests/run` says why.
    pub fn run(&self) -> ExitCode {
        let mut trials = Vec::new();
        for name in RELEASES {
            let suffix = format!("containerd_{}", name.replace('.', "_"));
            for &(test, run) in self.on_every_release {
                trials.push(trial(format!("{test}::{suffix}"), Release::find(name), run));
            }
            for &(test, run) in self.with_each_shim {
                for shim in ShimUnderTest::ALL {
                    let title = format!("{test}::{}::{suffix}", shim.word());
                    trials.push(trial(title, Release::find(name), move |release| {
                        run(release, shim)
                    }));
                }
            }
        }
        let newest = || {
            Release::available()
                .pop()
                .ok_or_else(|| "no release of containerd is there: run tests/setup".to_owned())
        };
        for &(test, run) in self.once {
            trials.push(trial(test.to_owned(), newest(), run));
        }
        let with = newer::newest_with;
        for (tests, needed) in [
            (self.once_with_each_shim, newest()),
            (self.with_criu_and_each_shim, with("criu")),
            (self.with_newer_runc, with("runc")),
            (
                self.with_loop_devices,
                loop_device::available().and_then(|()| newest()),
            ),
        ] {
            for (&(test, run), shim) in tests
                .iter()
                .flat_map(|test| ShimUnderTest::ALL.map(|shim| (test, shim)))
            {
                let title = format!("{test}::{}", shim.word());
                let needed = needed.clone();
                trials.push(trial(title, needed, move |release| run(release, shim)));
            }
        }
        for (tests, needed) in [
            (self.with_criu, with("criu")),
            (
                self.with_docker,
                with("dockerd").and_then(|_| with("docker")),
            ),
        ] {
            for &(test, run) in tests {
                trials.push(trial(test.to_owned(), needed.clone(), run));
            }
        }
        let needing = |tests: &[OnMachine], lack: &dyn Fn() -> Option<String>| {
            let trial = |&(test, run): &OnMachine| {
                trial(test.to_owned(), lack().map_or(Ok(()), Err), move |&()| {
                    run()
                })
            };
            tests.iter().map(trial).collect::<Vec<Trial>>()
        };
        let boxed = |kind: BoxKind| move || kind.unavailable();
        trials.extend(needing(self.in_a_box, &boxed(BoxKind::Container)));
        let docker = || newer::find("dockerd").and_then(|_| newer::find("docker"));
        let boxed_docker = || BoxKind::Container.unavailable().or_else(|| docker().err());
        trials.extend(needing(self.docker_in_a_box, &boxed_docker));
        trials.extend(needing(self.in_a_vm, &boxed(BoxKind::Vm)));
        trials.extend(needing(
            self.in_first_namespaces,
            &outside_of_first_namespaces,
        ));
        libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
    }
}

/// A test that needs something of the machine: what it is, or why it cannot be had.
pub fn trial<T: Send + 'static>(
    name: String,
    needed: Result<T, String>,
    run: impl FnOnce(&T) + Send + 'static,
) -> Trial {
    let unavailable = needed.is_err();
    Trial::test(name, move || match needed {
        Ok(needed) => {
            run(&needed);
            Ok(())
        }
        Err(why) => Err(why.into()),
    })
    .with_ignored_flag(unavailable)
}

/// The `main` of a test file; see the crate's first page. Lists may be left out.
#[macro_export]
macro_rules! tests {
    ($($list:ident: [$($test:ident),* $(,)?]),* $(,)?) => {
        fn main() -> ::std::process::ExitCode {
            $crate::Tests {
                $($list: &[$((stringify!($test), $test)),*],)*
                ..::std::default::Default::default()
            }
            .run()
        }
    };
}
