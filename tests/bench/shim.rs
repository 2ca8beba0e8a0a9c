//! The measuring half of `tests/bench/shim`: runs on a host of its own, containerd is up.
//!
//! Two ways to a shim: through `ctr`, as a user sees it, and straight to its socket, where only
//! the shim is measured. Both kinds are asked in turn, so that whatever else the machine does
//! hits both.

use std::error::Error;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, fcntl};
use prost::Message;
use prost_types::Any;
use recoverd_common::pb::task::{
    ConnectRequest, ConnectResponse, CreateTaskRequest, CreateTaskResponse, DeleteRequest,
    DeleteResponse, ExecProcessRequest, KillRequest, ShutdownRequest, StartRequest, StartResponse,
    WaitRequest, WaitResponse,
};
use recoverd_common::shim_client::{ShimClient, TASK_SERVICES};
use recoverd_tests::wait_within;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const ADDRESS: &str = "/run/containerd/containerd.sock";
const NAMESPACE: &str = "bench";
const LATENCY_ROUNDS: usize = 15;
const SIDE_BY_SIDE: usize = 50;
const THROUGHPUT_ROUNDS: usize = 3;
/// What a container writes for the throughput, MiB.
const MIB: usize = 1024;
/// Execs until a shim has its final size.
const WARM: usize = 1000;

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::from(3)
        }
    }
}

fn run() -> Result<bool> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [ctr, stock, ours, rootfs, execs] = args.as_slice() else {
        return Err("arguments are CTR STOCK_SHIM OUR_SHIM ROOTFS EXECS".into());
    };
    let bench = Bench {
        ctr: ctr.into(),
        rootfs: rootfs.into(),
        shims: [stock.into(), ours.into()],
    };
    let mut table = Table::new();
    bench.latency_through_ctr(&mut table)?;
    bench.latency_of_rpcs(&mut table)?;
    bench.throughput(&mut table)?;
    bench.memory(&mut table)?;
    bench.growth(execs.parse()?, &mut table)?;
    Ok(table.finish())
}

/// Index of the stock shim, and of ours, in every pair of figures.
const STOCK: usize = 0;
const OURS: usize = 1;

struct Bench {
    ctr: PathBuf,
    rootfs: PathBuf,
    shims: [PathBuf; 2],
}

// ---- output ----

struct Table {
    held: bool,
}

impl Table {
    fn new() -> Table {
        println!("\n{:<52} {:>10} {:>10} {:>7}", "", "stock", "ours", "ratio");
        Table { held: true }
    }

    /// One line; `promise` says what was promised of it and whether it holds.
    fn row(&mut self, what: &str, unit: &str, pair: [f64; 2], promise: Option<(String, bool)>) {
        let ratio = pair[OURS] / pair[STOCK];
        let verdict = match promise {
            None => String::new(),
            Some((text, true)) => format!("  promised: {text}: holds"),
            Some((text, false)) => {
                self.held = false;
                format!("  promised: {text}: DOES NOT HOLD")
            }
        };
        let what = format!("{what}, {unit}");
        let [stock, ours] = pair;
        println!("{what:<52} {stock:>10.1} {ours:>10.1} {ratio:>7.2}{verdict}");
    }

    fn note(&self, text: &str) {
        println!("{text}");
    }

    fn finish(self) -> bool {
        self.held
    }
}

fn at_most(limit: f64, value: f64, unit: &str) -> Option<(String, bool)> {
    Some((format!("at most {limit} {unit}"), value <= limit))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn ms(began: Instant) -> f64 {
    began.elapsed().as_secs_f64() * 1000.0
}

// ---- commands ----

fn succeed(command: &mut Command) -> Result<()> {
    let output = command.stdin(Stdio::null()).output()?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    Err(format!("{command:?}: {}: {said}", output.status).into())
}

impl Bench {
    fn ctr(&self, args: &[&str]) -> Result<()> {
        succeed(
            Command::new(&self.ctr)
                .args(["--namespace", NAMESPACE])
                .args(args),
        )
    }

    fn ctr_run(&self, shim: &Path, id: &str) -> Result<()> {
        let (shim, rootfs) = (
            shim.display().to_string(),
            self.rootfs.display().to_string(),
        );
        let options = ["run", "--detach", "--runtime", &shim, "--env", "PATH=/bin"];
        let rest = ["--rootfs", &rootfs, id, "sleep", "1000000"];
        self.ctr(&[&options[..], &rest].concat())
    }

    fn ctr_exec(&self, id: &str, exec_id: &str) -> Result<()> {
        self.ctr(&["tasks", "exec", "--exec-id", exec_id, id, "true"])
    }

    fn ctr_remove(&self, id: &str) -> Result<()> {
        self.ctr(&["tasks", "delete", "--force", id])
    }

    fn latency_through_ctr(&self, table: &mut Table) -> Result<()> {
        let mut figures: [[Vec<f64>; 3]; 2] = Default::default();
        for round in 0..=LATENCY_ROUNDS {
            for (shim, figures) in self.shims.iter().zip(&mut figures) {
                let id = format!("latency-{round}");
                let began = Instant::now();
                self.ctr_run(shim, &id)?;
                let run = ms(began);
                let began = Instant::now();
                self.ctr_exec(&id, "once")?;
                let exec = ms(began);
                let began = Instant::now();
                self.ctr_remove(&id)?;
                let remove = ms(began);
                self.ctr(&["containers", "delete", &id])?;
                // The first round reads everything from the disk.
                if round > 0 {
                    for (list, figure) in figures.iter_mut().zip([run, exec, remove]) {
                        list.push(figure);
                    }
                }
            }
        }
        let [stock, ours] = figures;
        let what = ["ctr run -d", "ctr task exec", "kill + delete by ctr"];
        for ((what, stock), ours) in what.into_iter().zip(stock).zip(ours) {
            let pair = [median(stock), median(ours)];
            let promised = what.starts_with("ctr ").then(|| {
                (
                    "faster than the stock shim".to_owned(),
                    pair[OURS] < pair[STOCK],
                )
            });
            table.row(what, "ms", pair, promised);
        }
        Ok(())
    }
}

// ---- straight to a shim ----

/// A bundle and the shim that `start` gave for it.
struct Direct {
    client: ShimClient,
    service: &'static str,
    id: String,
    bundle: PathBuf,
    /// Reads its `log`: the stock shim serves nobody before somebody does.
    _log: File,
}

impl Bench {
    /// A bundle as containerd makes it.
    fn bundle(&self, id: &str, command: &[&str]) -> Result<PathBuf> {
        let bundle = Path::new("/run/bench").join(id);
        let _ = fs::remove_dir_all(&bundle);
        fs::create_dir_all(&bundle)?;
        succeed(Command::new("runc").arg("spec").current_dir(&bundle))?;
        let path = bundle.join("config.json");
        let mut config: serde_json::Value = serde_json::from_slice(&fs::read(&path)?)?;
        config["process"]["terminal"] = false.into();
        config["process"]["args"] = command.to_vec().into();
        config["process"]["env"] = vec!["PATH=/bin"].into();
        config["root"]["path"] = self.rootfs.display().to_string().into();
        config["linux"]["cgroupsPath"] = format!("/{NAMESPACE}/{id}").into();
        fs::write(&path, serde_json::to_vec(&config)?)?;
        Ok(bundle)
    }

    fn start(&self, shim: &Path, id: &str, bundle: PathBuf) -> Result<Direct> {
        let path = bundle.join("log");
        make_fifo(&path)?;
        let log = File::options().read(true).write(true).open(&path)?;
        let output = Command::new(shim)
            .args(["-namespace", NAMESPACE, "-address", ADDRESS])
            .args(["-publish-binary", "/bin/true", "-id", id, "start"])
            .env("TTRPC_ADDRESS", format!("{ADDRESS}.ttrpc"))
            .current_dir(&bundle)
            .stdin(Stdio::null())
            .output()?;
        if !output.status.success() {
            return Err(format!("start: {}", String::from_utf8_lossy(&output.stderr)).into());
        }
        // Text, or the JSON of a stock shim from 2.0 on: the path is in it either way.
        let text = String::from_utf8(output.stdout)?;
        let from = text.find("unix://").ok_or("start gave no address")?;
        let path: String = text
            .chars()
            .skip(from + "unix://".len())
            .take_while(|c| *c != '"' && !c.is_whitespace())
            .collect();
        let deadline = Instant::now() + Duration::from_secs(7200);
        let mut client = ShimClient::connect(Path::new(&path), NAMESPACE, deadline)?;
        let [second, third] = TASK_SERVICES;
        let service = if client.api_version(id)? == 2 {
            second
        } else {
            third
        };
        Ok(Direct {
            client,
            service,
            id: id.to_owned(),
            bundle,
            _log: log,
        })
    }
}

impl Direct {
    fn call<R: Message + Default>(&mut self, method: &str, request: &impl Message) -> Result<R> {
        let answer = self.client.call(self.service, method, request);
        Ok(answer.map_err(|error| format!("{method}: {error}"))?)
    }

    fn create(&mut self, stdout: &str) -> Result<()> {
        let request = CreateTaskRequest {
            id: self.id.clone(),
            bundle: self.bundle.display().to_string(),
            stdout: stdout.to_owned(),
            stderr: stderr_beside(stdout),
            ..Default::default()
        };
        self.call::<CreateTaskResponse>("Create", &request)?;
        Ok(())
    }

    fn start(&mut self, exec_id: &str) -> Result<()> {
        let request = StartRequest {
            id: self.id.clone(),
            exec_id: exec_id.into(),
        };
        self.call::<StartResponse>("Start", &request)?;
        Ok(())
    }

    fn exec(&mut self, exec_id: &str, stdout: &str, command: &[&str]) -> Result<()> {
        let process = serde_json::json!({
            "args": command, "cwd": "/", "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0},
        });
        let request = ExecProcessRequest {
            id: self.id.clone(),
            exec_id: exec_id.into(),
            stdout: stdout.to_owned(),
            stderr: stderr_beside(stdout),
            spec: Some(Any {
                type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".into(),
                value: serde_json::to_vec(&process)?,
            }),
            ..Default::default()
        };
        self.call::<()>("Exec", &request)
    }

    fn wait_and_delete(&mut self, exec_id: &str) -> Result<()> {
        let request = WaitRequest {
            id: self.id.clone(),
            exec_id: exec_id.into(),
        };
        self.call::<WaitResponse>("Wait", &request)?;
        let request = DeleteRequest {
            id: self.id.clone(),
            exec_id: exec_id.into(),
        };
        self.call::<DeleteResponse>("Delete", &request)?;
        Ok(())
    }

    fn kill(&mut self) -> Result<()> {
        let request = KillRequest {
            id: self.id.clone(),
            signal: 9,
            ..Default::default()
        };
        self.call::<()>("Kill", &request)
    }

    fn pid(&mut self) -> Result<u32> {
        let request = ConnectRequest {
            id: self.id.clone(),
        };
        Ok(self.call::<ConnectResponse>("Connect", &request)?.shim_pid)
    }

    /// The container has exited or is killed.
    fn end(mut self) -> Result<()> {
        self.wait_and_delete("")?;
        let request = ShutdownRequest {
            id: self.id.clone(),
            now: false,
        };
        // The stock shim may be gone before it answers.
        let _ = self.call::<()>("Shutdown", &request);
        fs::remove_dir_all(&self.bundle)?;
        Ok(())
    }
}

impl Bench {
    fn latency_of_rpcs(&self, table: &mut Table) -> Result<()> {
        let mut bare = Vec::new();
        let mut figures: [[Vec<f64>; 2]; 2] = Default::default();
        for round in 0..=LATENCY_ROUNDS {
            let id = format!("rpc-{round}");
            let bundle = self.bundle(&id, &["sleep", "1000000"])?;
            let bundle_text = bundle.display().to_string();
            let quiet = |args: &[&str]| -> Result<()> {
                let mut command = Command::new("runc");
                command.args(args).stdin(Stdio::null());
                command.stdout(Stdio::null()).stderr(Stdio::null());
                let status = command.status()?;
                if !status.success() {
                    return Err(format!("{command:?}: {status}").into());
                }
                Ok(())
            };
            let pid_file = format!("{bundle_text}/init.pid");
            let began = Instant::now();
            quiet(&[
                "create",
                "--bundle",
                &bundle_text,
                "--pid-file",
                &pid_file,
                &id,
            ])?;
            quiet(&["start", &id])?;
            let took = ms(began);
            if round > 0 {
                bare.push(took);
            }
            quiet(&["delete", "--force", &id])?;
            for (shim, figures) in self.shims.iter().zip(&mut figures) {
                let bundle = self.bundle(&id, &["sleep", "1000000"])?;
                let mut direct = self.start(shim, &id, bundle)?;
                let began = Instant::now();
                direct.create("")?;
                direct.start("")?;
                let created = ms(began);
                let began = Instant::now();
                direct.exec("once", "", &["true"])?;
                direct.start("once")?;
                let executed = ms(began);
                direct.wait_and_delete("once")?;
                direct.kill()?;
                direct.end()?;
                if round > 0 {
                    for (list, figure) in figures.iter_mut().zip([created, executed]) {
                        list.push(figure);
                    }
                }
            }
        }
        let bare = median(bare);
        let [[stock_create, stock_exec], [ours_create, ours_exec]] = figures;
        let pair = [median(stock_create), median(ours_create)];
        let promise = at_most((bare + 10.0).round(), pair[OURS], "ms (bare runc + 10 ms)");
        table.note(&format!(
            "{:<52} {bare:>10.1}",
            "bare runc create && runc start, ms"
        ));
        table.row("Create + Start RPCs", "ms", pair, promise);
        let pair = [median(stock_exec), median(ours_exec)];
        table.row("Exec + Start RPCs", "ms", pair, None);
        Ok(())
    }
}

// ---- throughput ----

fn make_fifo(path: &Path) -> Result<()> {
    succeed(Command::new("mkfifo").arg(path))
}

/// The stock shim wants a stderr where there is a stdout.
fn stderr_beside(stdout: &str) -> String {
    if stdout.is_empty() {
        String::new()
    } else {
        format!("{stdout}-err")
    }
}

/// New fifos for stdout and stderr, and readers of both, for whom the stock shim waits.
fn fresh(stdout: &str) -> Result<(File, File)> {
    fs::create_dir_all(Path::new(stdout).parent().ok_or("a fifo needs a folder")?)?;
    let open = |path: &str| -> Result<File> {
        let _ = fs::remove_file(path);
        make_fifo(Path::new(path))?;
        // Read-write: opening waits for nobody, and a last writer's end does not end it.
        Ok(File::options().read(true).write(true).open(path)?)
    };
    Ok((open(stdout)?, open(&stderr_beside(stdout))?))
}

/// Reads until `expected` bytes were there; MiB/s.
fn read_all(mut fifo: File, expected: usize) -> Result<f64> {
    let mut buffer = vec![0; 1 << 20];
    let mut seen = fifo.read(&mut buffer)?;
    let began = Instant::now();
    let first = seen;
    while seen < expected {
        seen += fifo.read(&mut buffer)?;
    }
    let mib = (seen - first) as f64 / f64::from(1 << 20);
    Ok(mib / began.elapsed().as_secs_f64())
}

impl Bench {
    fn throughput(&self, table: &mut Table) -> Result<()> {
        let writer = format!("exec dd if=/dev/zero bs=1M count={MIB} 2>/dev/null");
        let writer = ["sh", "-c", writer.as_str()];
        let expected = MIB << 20;
        let stdout = "/run/bench/fifo";
        let mut init: [Vec<f64>; 2] = Default::default();
        let mut exec: [Vec<f64>; 2] = Default::default();
        let mut bare = Vec::new();
        for _ in 0..THROUGHPUT_ROUNDS {
            let mut size = 0;
            for (at, shim) in self.shims.iter().enumerate() {
                let (reader, _stderr) = fresh(stdout)?;
                let bundle = self.bundle("through", &writer)?;
                let mut direct = self.start(shim, "through", bundle)?;
                direct.create(stdout)?;
                size = fcntl(&reader, FcntlArg::F_GETPIPE_SZ)?;
                direct.start("")?;
                init[at].push(read_all(reader, expected)?);
                direct.end()?;

                let (reader, _stderr) = fresh(stdout)?;
                let bundle = self.bundle("through", &["sleep", "1000000"])?;
                let mut direct = self.start(shim, "through", bundle)?;
                direct.create("")?;
                direct.start("")?;
                direct.exec("writer", stdout, &writer)?;
                direct.start("writer")?;
                exec[at].push(read_all(reader, expected)?);
                direct.wait_and_delete("writer")?;
                direct.kill()?;
                direct.end()?;
            }
            // The same program on a fifo of the size that ours has.
            let (reader, _stderr) = fresh(stdout)?;
            fcntl(&reader, FcntlArg::F_SETPIPE_SZ(size))?;
            let mut command = Command::new(self.rootfs.join("bin/busybox"));
            command.args(writer).stdin(Stdio::null());
            let mut child = command.stdout(reader.try_clone()?).spawn()?;
            bare.push(read_all(reader, expected)?);
            child.wait()?;
        }
        let bare = median(bare);
        let pair = init.map(median);
        table.note(&format!(
            "{:<52} {bare:>10.1}",
            "bare fifo of the same size, MiB/s"
        ));
        let share = pair[OURS] / bare;
        let promise = (format!("0.95 of the bare fifo ({share:.2})"), share >= 0.95);
        table.row("stdout of an init", "MiB/s", pair, Some(promise));
        let pair = exec.map(median);
        let ratio = pair[OURS] / pair[STOCK];
        table.row(
            "stdout of an exec",
            "MiB/s",
            pair,
            Some(("1.5 x stock".into(), ratio >= 1.5)),
        );
        Ok(())
    }
}

// ---- memory ----

#[derive(Clone, Copy)]
struct Memory {
    private_dirty: f64,
    pss: f64,
    threads: f64,
}

impl Memory {
    fn of(pid: u32) -> Result<Memory> {
        let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let field = |text: &str, name: &str| -> Result<f64> {
            let line = text.lines().find_map(|line| line.strip_prefix(name));
            let word = line.and_then(|line| line.split_whitespace().next());
            Ok(word.ok_or_else(|| format!("no {name} of {pid}"))?.parse()?)
        };
        Ok(Memory {
            private_dirty: field(&rollup, "Private_Dirty:")?,
            pss: field(&rollup, "Pss:")?,
            threads: field(&status, "Threads:")?,
        })
    }
}

/// A shim whose memory has been the same for so long is idle: several times what ours waits
/// before it gives back what it does not need.
const UNCHANGED: Duration = Duration::from_millis(500);

/// The memory of a shim that has nothing to do: when it has not changed for a while. Ours gives
/// back what it does not need some 100 ms after its last work, as it does all its life.
fn idle(pid: u32) -> Result<Memory> {
    let mut last = Memory::of(pid)?;
    let mut since = Instant::now();
    wait_within(Duration::from_secs(10), "a shim to be idle", || {
        let now = match Memory::of(pid) {
            Ok(now) => now,
            Err(error) => return Some(Err(error)),
        };
        if (now.pss - last.pss).abs() > 4.0 {
            last = now;
            since = Instant::now();
        }
        (since.elapsed() >= UNCHANGED).then_some(Ok(now))
    })
}

/// Shims that serve, by their command line.
fn shim_pids(program: &Path) -> Result<Vec<u32>> {
    let mut pids = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let Some(pid) = entry?
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let mut words = line.split(|byte| *byte == 0);
        if words.next() == Some(program.as_os_str().as_encoded_bytes()) {
            pids.push(pid);
        }
    }
    Ok(pids)
}

impl Bench {
    fn memory(&self, table: &mut Table) -> Result<()> {
        let mut busy = [0.0; 2];
        let mut alone = [0.0; 2];
        let mut many: [Option<Memory>; 2] = [None; 2];
        for (at, shim) in self.shims.iter().enumerate() {
            for number in 0..SIDE_BY_SIDE {
                let id = format!("many-{number}");
                self.ctr_run(shim, &id)?;
                self.ctr_exec(&id, "once")?;
                if number == 0 {
                    let pids = shim_pids(shim)?;
                    let [pid] = pids.as_slice() else {
                        return Err(format!("{pids:?} instead of one shim").into());
                    };
                    busy[at] = Memory::of(*pid)?.pss;
                    alone[at] = idle(*pid)?.pss;
                }
            }
            for pid in shim_pids(shim)? {
                idle(pid)?;
            }
            let all: Vec<Memory> = shim_pids(shim)?
                .into_iter()
                .map(Memory::of)
                .collect::<Result<_>>()?;
            if all.len() != SIDE_BY_SIDE {
                return Err(format!("{} instead of {SIDE_BY_SIDE} shims", all.len()).into());
            }
            let of = |figure: fn(&Memory) -> f64| median(all.iter().map(figure).collect());
            many[at] = Some(Memory {
                private_dirty: of(|m| m.private_dirty),
                pss: of(|m| m.pss),
                threads: of(|m| m.threads),
            });
            for number in 0..SIDE_BY_SIDE {
                let id = format!("many-{number}");
                self.ctr_remove(&id)?;
                self.ctr(&["containers", "delete", &id])?;
            }
        }
        let [Some(stock), Some(ours)] = many else {
            return Err("memory was not measured".into());
        };
        let pair = [stock.private_dirty, ours.private_dirty];
        let label = format!("private-dirty, idle, median of {SIDE_BY_SIDE} side by side");
        table.row(&label, "KiB", pair, at_most(400.0, pair[OURS], "KiB"));
        let pair = [stock.pss, ours.pss];
        let label = format!("PSS, idle, median of {SIDE_BY_SIDE} side by side");
        table.row(&label, "KiB", pair, at_most(450.0, pair[OURS], "KiB"));
        table.row(
            "PSS, alone, idle after one exec",
            "KiB",
            alone,
            at_most(1024.0, alone[OURS], "KiB"),
        );
        table.row("PSS, alone, the moment an exec ends", "KiB", busy, None);
        let pair = [stock.threads, ours.threads];
        table.row(
            "threads",
            "number",
            pair,
            at_most(1.0, pair[OURS], "thread"),
        );
        Ok(())
    }

    fn growth(&self, execs: usize, table: &mut Table) -> Result<()> {
        let mut warm = [0.0; 2];
        let mut grown = [0.0; 2];
        for (at, shim) in self.shims.iter().enumerate() {
            let bundle = self.bundle("growing", &["sleep", "1000000"])?;
            let mut direct = self.start(shim, "growing", bundle)?;
            direct.create("")?;
            direct.start("")?;
            let pid = direct.pid()?;
            for number in 0..execs {
                if number == WARM.min(execs / 2) {
                    warm[at] = Memory::of(pid)?.private_dirty;
                }
                let id = format!("exec-{number}");
                direct.exec(&id, "", &["true"])?;
                direct.start(&id)?;
                direct.wait_and_delete(&id)?;
            }
            grown[at] = Memory::of(pid)?.private_dirty - warm[at];
            direct.kill()?;
            direct.end()?;
        }
        let first = WARM.min(execs / 2);
        table.row(
            &format!("private-dirty after {first} execs"),
            "KiB",
            warm,
            None,
        );
        let label = format!("growth from there to {execs} execs");
        table.row(&label, "KiB", grown, at_most(32.0, grown[OURS], "KiB"));
        Ok(())
    }
}
