//! `recoverd`: the command line. Parses, loads the configuration, runs one command and turns its
//! result into an exit code; everything else is in `commands`.

mod adopt;
mod apply;
mod classify;
mod cli;
mod commands;
mod config;
mod correlate;
mod dump;
mod ending;
mod explain;
mod facts;
mod findings;
mod history;
mod hooks;
mod lock;
mod observe;
mod own_dir;
mod permit;
mod plan;
mod preflight;
mod quarantine;
mod release;
mod report;
mod supervise;
mod sys;
mod upgrade;
mod verify;
mod witnessed;

use std::{
    io::{self, Write},
    process::ExitCode,
};

use clap::Parser;

use cli::{Cli, Command};
use config::Config;

/// How a command ended, as `--help` says it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing found.
    Clean,
    /// Findings.
    Findings,
    /// Could not see everything.
    Gaps,
    /// What was done does not hold, or not all of it.
    Unkept,
}

/// Why a command did not run.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The words were wrong; exit 2.
    #[error("{0}")]
    Usage(String),
    /// Output could not be written.
    #[error("write output: {0}")]
    Output(#[from] io::Error),
    /// Something that a look needs is missing; exit 3.
    #[error("{0}")]
    Blind(String),
    /// Somebody else holds the lock; exit 4.
    #[error("{0}")]
    Held(String),
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return refused(&error),
    };
    match run(&cli) {
        Ok(Verdict::Clean) => ExitCode::from(0),
        Ok(Verdict::Findings | Verdict::Unkept) => ExitCode::from(1),
        Ok(Verdict::Gaps) => ExitCode::from(3),
        // Whoever reads our output has seen enough.
        Err(Failure::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => {
            ExitCode::from(0)
        }
        Err(failure) => {
            complain(&failure.to_string());
            ExitCode::from(match failure {
                Failure::Usage(_) => 2,
                Failure::Output(_) | Failure::Blind(_) => 3,
                Failure::Held(_) => 4,
            })
        }
    }
}

/// What `-v` asks for, on standard error.
fn tell_steps(verbose: u8, daemon: bool) {
    let level = match verbose {
        0 if daemon => tracing::Level::INFO,
        0 => return,
        1 => tracing::Level::INFO,
        _ => tracing::Level::DEBUG,
    };
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(io::stderr)
        .with_ansi(io::IsTerminal::is_terminal(&io::stderr()))
        .finish();
    // Set once, here; a second one would be refused, and there is none.
    let _ = tracing::subscriber::set_global_default(subscriber);
}

fn run(cli: &Cli) -> Result<Verdict, Failure> {
    tell_steps(
        cli.global.verbose,
        matches!(cli.command, Command::Supervise),
    );
    if let Command::Explain(args) = &cli.command {
        let text = commands::explain::text(args).map_err(|e| Failure::Usage(e.to_string()))?;
        commands::explain::run(&text, &mut io::stdout().lock())?;
        return Ok(Verdict::Clean);
    }
    #[cfg(feature = "failpoints")]
    if matches!(cli.command, Command::Failpoints) {
        for name in recoverd_common::failpoint::names() {
            writeln!(io::stdout(), "{name}")?;
        }
        return Ok(Verdict::Clean);
    }
    let mut config = configuration(cli)?;
    match &cli.command {
        Command::Scan(args) => {
            if let Some(min_age) = args.min_age {
                config.override_min_age(min_age);
            }
            commands::scan::run(args, &cli.global, &config)
        }
        Command::Show(args) => commands::show::run(args, &cli.global, &config),
        Command::Preflight(args) => commands::preflight::run(args, &cli.global, &config),
        Command::Dump(args) => commands::dump::run(args, &cli.global, &config),
        Command::Adopt(args) => commands::adopt::run(args, &cli.global, &config),
        Command::PreStart(args) => {
            if let Some(deadline) = args.deadline {
                config.override_deadline(deadline);
            }
            commands::pre_start::run(args, &cli.global, &config)
        }
        Command::PostStart(args) => commands::post_start::run(args, &cli.global, &config),
        Command::Repair(args) => {
            if let Some(min_age) = args.min_age {
                config.override_min_age(min_age);
            }
            commands::repair::run(args, &cli.global, &config)
        }
        Command::Supervise => commands::supervise::run(&cli.global, &config),
        Command::Upgrade(args) => commands::upgrade::run(args, &cli.global, &config),
        Command::History(args) => commands::history::run(args, &config),
        Command::Explain(_) => Ok(Verdict::Clean),
        #[cfg(feature = "failpoints")]
        Command::Failpoints => Ok(Verdict::Clean),
        Command::Config => {
            commands::config::run(&config, &mut io::stdout().lock())?;
            Ok(Verdict::Clean)
        }
    }
}

fn configuration(cli: &Cli) -> Result<Config, Failure> {
    let usage = |error: config::ConfigError| Failure::Usage(error.to_string());
    let goes_on = match &cli.command {
        Command::PreStart(args) => !args.strict,
        Command::PostStart(args) => !args.strict,
        // Nothing else looks after the shims, and its unit would start it again and again.
        Command::Supervise => true,
        _ => false,
    };
    if !goes_on {
        return Config::load(&cli.global).map_err(usage);
    }
    let (config, error) = Config::load_or_default(&cli.global).map_err(usage)?;
    if let Some(error) = error {
        complain(&format!("{error}: going on with the defaults"));
    }
    Ok(config)
}

/// One line for a usage error, all of it for `--help` and `--version`.
fn refused(error: &clap::Error) -> ExitCode {
    if !error.use_stderr() {
        // A closed pipe is no error.
        let _ = error.print();
        return ExitCode::from(0);
    }
    let text = error.render().to_string();
    let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let first = lines.next().unwrap_or("usage error");
    let mut line = first.strip_prefix("error: ").unwrap_or(first).to_owned();
    // What is allowed stands in brackets or, for what is missing, on lines of its own.
    for more in lines {
        if more.starts_with("Usage:") || more.starts_with("For more information") {
            break;
        }
        line.push(' ');
        line.push_str(more);
    }
    complain(&line);
    ExitCode::from(2)
}

fn complain(line: &str) {
    // There is nobody left to tell when standard error is gone.
    let _ = writeln!(io::stderr(), "recoverd: {line}");
}
