//! The command line: names, defaults and help. What a word does is in `commands`.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

/// The systemd unit that runs containerd, on most machines.
pub const UNIT: &str = "containerd.service";

/// Finds and explains what is wrong with the runc shims of a node.
///
/// Looks by default and changes nothing.
#[derive(Debug, Parser)]
#[command(
    name = "recoverd",
    version,
    max_term_width = 100,
    disable_help_subcommand = true,
    after_help = "Exit codes of commands that look: 0 nothing found, 1 findings, 2 usage error,\n\
                  3 could not see everything. Of commands that act: 0 all that was promised holds,\n\
                  1 some does not, 2 usage error, 3 could not see, 4 another recoverd is at work."
)]
pub struct Cli {
    #[command(flatten)]
    /// Flags that come before the command.
    pub global: Global,
    #[command(subcommand)]
    /// What to do.
    pub command: Command,
}

/// Flags of every command.
#[derive(Debug, Args)]
pub struct Global {
    /// Look at this containerd only: its gRPC address, as in containerd's own flag
    #[arg(short, long, value_name = "PATH")]
    pub address: Option<PathBuf>,
    /// Its state folder [default: as configured, else /run/containerd]
    #[arg(long, value_name = "DIR")]
    pub state: Option<PathBuf>,
    /// Its root folder [default: as configured, else /var/lib/containerd]
    #[arg(long, value_name = "DIR")]
    pub root: Option<PathBuf>,
    /// Where shims' sockets are [default: /run/containerd/s]
    #[arg(long, value_name = "DIR")]
    pub socket_dir: Option<PathBuf>,
    /// Where runc keeps its state [default: /run/containerd/runc]
    #[arg(long, value_name = "DIR")]
    pub runc_root: Option<PathBuf>,
    /// recoverd's own runtime files [default: /run/recoverd]
    #[arg(long, value_name = "DIR")]
    pub run_dir: Option<PathBuf>,
    /// What recoverd did [default: /var/lib/recoverd/history.jsonl]
    #[arg(long, value_name = "FILE")]
    pub history: Option<PathBuf>,
    /// Configuration [default: /etc/recoverd/config.toml, if there]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Look at tasks of this containerd namespace only
    #[arg(short, long, value_name = "NAME")]
    pub namespace: Option<String>,
    /// Tell on standard error what is being looked at; twice, what each shim answered
    #[arg(short, long, action = clap::ArgAction::Count)]
    pub verbose: u8,
    /// Colour the output
    #[arg(long, value_enum, value_name = "WHEN")]
    pub color: Option<Color>,
}

/// When to colour.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Color {
    /// On a terminal, unless NO_COLOR is set
    Auto,
    /// Always
    Always,
    /// Never
    Never,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Look once at every task and leftover of the node
    Scan(Scan),
    /// Tell everything known of one task, whose word each fact is, and where they differ
    Show(Show),
    /// Will a restart or upgrade of containerd be harmless now?
    Preflight(Preflight),
    /// Write all facts about one task into a tar file, for a bug report
    Dump(Dump),
    /// Start our shim for tasks whose shim is gone, where containerd will look for it
    Adopt(Adopt),
    /// Before containerd starts: have no workload die at that start
    PreStart(PreStart),
    /// After containerd started: tell what became of every task
    PostStart(PostStart),
    /// Keep watch, so that no shim is lost: the daemon
    #[command(
        after_help = "Runs until it is asked to stop, by systemd/recoverd.service. Gives a shim of ours that crashes a\n\
                      successor before containerd notices; witnesses how every init and exec ends; ends nothing\n\
                      itself. Metrics on RUN-DIR/metrics.sock, and as supervise.* of the configuration says.\n\
                      Exits 4 when another one runs."
    )]
    Supervise,
    /// Have our shims become the installed version, in place, without touching a container
    Upgrade(Upgrade),
    /// Show what would mend what is wrong, and do it with --apply
    Repair(Repair),
    /// Tell what recoverd did
    History(History),
    /// Tell what a finding means, how it comes about and what to do
    Explain(Explain),
    /// Print the effective configuration and where each value comes from
    Config,
    /// Print the places where a test may let this program die
    #[cfg(feature = "failpoints")]
    #[command(hide = true)]
    Failpoints,
}

/// `recoverd scan`
#[derive(Debug, Args)]
pub struct Scan {
    /// How to print
    #[arg(
        short,
        long,
        value_enum,
        default_value = "table",
        value_name = "FORMAT"
    )]
    pub output: ScanFormat,
    /// Report leaked resources only when they are at least this old, such as 0s, 90s, 10m
    #[arg(long, value_name = "TIME", value_parser = crate::config::parse_duration)]
    pub min_age: Option<std::time::Duration>,
    /// Let healthy tasks out of the table
    #[arg(short, long)]
    pub quiet: bool,
}

/// Formats of `scan`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ScanFormat {
    /// For people
    Table,
    /// One object, schema recoverd/scan/1
    Json,
    /// Metrics in Prometheus' text format
    Prometheus,
}

/// Formats of commands that print one text or one object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum TextOrJson {
    /// For people
    Text,
    /// One object
    Json,
}

/// `recoverd show`
#[derive(Debug, Args)]
pub struct Show {
    /// Containerd namespace and id of the task
    #[arg(value_name = "NS/ID")]
    pub task: String,
    /// How to print
    #[arg(short, long, value_enum, default_value = "text", value_name = "FORMAT")]
    pub output: TextOrJson,
}

/// `recoverd preflight`
#[derive(Debug, Args)]
pub struct Preflight {
    /// The containerd release that is to start, such as 2.1 [default: the one that runs]
    #[arg(long, value_name = "VERSION", value_parser = crate::release::Release::of_word)]
    pub to: Option<crate::release::Release>,
    /// The systemd unit that runs containerd
    #[arg(long, default_value = UNIT, value_name = "UNIT")]
    pub unit: String,
    /// How to print
    #[arg(short, long, value_enum, default_value = "text", value_name = "FORMAT")]
    pub output: TextOrJson,
}

/// `recoverd dump`
#[derive(Debug, Args)]
pub struct Dump {
    /// Containerd namespace and id of the task
    #[arg(value_name = "NS/ID")]
    pub task: String,
    /// Where to write the tar; - is standard output
    #[arg(short, long, value_name = "FILE", default_value = "-")]
    pub output: PathBuf,
    /// Have a Go shim write its stacks into its log first (sends it SIGUSR1)
    #[arg(long)]
    pub stack: bool,
}

/// `recoverd adopt`
#[derive(Debug, Args)]
pub struct Adopt {
    /// Containerd namespace and id of tasks; none: all that are orphaned. Of a pod the whole pod
    /// is adopted, it has one shim
    #[arg(value_name = "NS/ID")]
    pub tasks: Vec<String>,
    /// How to print
    #[arg(
        short,
        long,
        value_enum,
        default_value = "table",
        value_name = "FORMAT"
    )]
    pub output: TableOrJson,
}

/// `recoverd pre-start`
#[derive(Debug, Args)]
#[command(
    after_help = "Looks at the containerd that --address names [default: /run/containerd/containerd.sock], and\n\
                  does nothing while it runs. Exits 0 whatever it finds, so that it never keeps containerd\n\
                  from starting, unless --strict says otherwise."
)]
pub struct PreStart {
    /// Be done within this time [default: 20s, or pre-start.deadline of the configuration]
    #[arg(long, value_name = "TIME", value_parser = crate::config::parse_duration)]
    pub deadline: Option<std::time::Duration>,
    /// The systemd unit that runs containerd. Named, it tells which program is about to start
    #[arg(long, value_name = "UNIT")]
    pub unit: Option<String>,
    /// The program that is about to start, where the unit does not say [default: as --unit says]
    #[arg(long, value_name = "PATH")]
    pub containerd: Option<PathBuf>,
    /// Exit as commands that act do: not 0 when a workload will be lost
    #[arg(long)]
    pub strict: bool,
}

/// `recoverd post-start`
#[derive(Debug, Args)]
#[command(
    after_help = "Compares with what pre-start saw of the containerd that --address names\n\
                  [default: /run/containerd/containerd.sock]. Exits 0 whatever it finds, unless --strict\n\
                  says otherwise."
)]
pub struct PostStart {
    /// How to print
    #[arg(
        short,
        long,
        value_enum,
        default_value = "table",
        value_name = "FORMAT"
    )]
    pub output: TableOrJson,
    /// Exit 1 when a workload was lost, 3 when it cannot be told
    #[arg(long)]
    pub strict: bool,
}

/// `recoverd upgrade`
#[derive(Debug, Args)]
#[command(
    after_help = "A shim tries the new executable first and stays as it is if that cannot go on from there; then\n\
                  the same process goes on as the new version. One that runs the installed file is left alone.\n\
                  After one that could not, the others are left too."
)]
pub struct Upgrade {
    /// Containerd namespace and id of tasks whose shims are to be upgraded
    #[arg(value_name = "NS/ID")]
    pub tasks: Vec<String>,
    /// All shims of ours
    #[arg(long, conflicts_with = "tasks")]
    pub all: bool,
    /// Only show what would be done
    #[arg(long)]
    pub dry_run: bool,
    /// Only tell which tasks run which version; without tasks, of all shims of ours
    #[arg(long, conflicts_with = "dry_run")]
    pub check: bool,
    /// How to print
    #[arg(
        short,
        long,
        value_enum,
        default_value = "table",
        value_name = "FORMAT"
    )]
    pub output: TableOrJson,
}

/// `recoverd repair`
#[derive(Debug, Args)]
pub struct Repair {
    /// Do it; without, the plan is shown and nothing is changed
    #[arg(long)]
    pub apply: bool,
    /// Allow steps that destroy: kill ends processes, delete deletes data
    #[arg(long, value_enum, value_name = "WHAT")]
    pub allow: Vec<crate::permit::Word>,
    /// Only this finding, such as stale-socket, or this task; may be given several times
    #[arg(long, value_name = "CODE|NS/ID")]
    pub only: Vec<String>,
    /// Leave alone what is younger, such as 0s, 90s, 10m
    #[arg(long, value_name = "TIME", value_parser = crate::config::parse_duration)]
    pub min_age: Option<std::time::Duration>,
    /// How to print
    #[arg(
        short,
        long,
        value_enum,
        default_value = "table",
        value_name = "FORMAT"
    )]
    pub output: TableOrJson,
}

/// `recoverd history`
#[derive(Debug, Args)]
pub struct History {
    /// How to print
    #[arg(
        short,
        long,
        value_enum,
        default_value = "table",
        value_name = "FORMAT"
    )]
    pub output: TableOrJson,
    /// Only what was done since then: a time such as 2026-11-24T05:00:00Z, or so long ago, such as 2h
    #[arg(long, value_name = "WHEN", value_parser = crate::history::Since::parse)]
    pub since: Option<crate::history::Since>,
    /// Only the last so many lines
    #[arg(long, value_name = "COUNT")]
    pub limit: Option<usize>,
}

/// Formats of commands that print a table or one object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum TableOrJson {
    /// For people
    Table,
    /// One object
    Json,
}

/// `recoverd explain`
#[derive(Debug, Args)]
pub struct Explain {
    /// A finding's code, such as orphaned-task; none lists them all
    #[arg(value_name = "CODE")]
    pub code: Option<String>,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_definition_is_consistent() {
        super::Cli::command().debug_assert();
    }
}
