//! The systemd unit that runs containerd, as `systemctl show` tells: how it is set up, and what it
//! starts. Only asks.

use std::{collections::HashMap, path::Path, time::Duration};

use recoverd_common::seen::Seen;

use super::command;
use crate::facts::Unit;

/// There when systemd is the init of this machine (sd_booted(3)).
const BOOTED: &str = "/run/systemd/system";
/// systemd may be busy with a reload of its units; a hung one must not hang us.
const TIMEOUT: Duration = Duration::from_secs(5);
/// A dozen lines are expected, bytes.
const MAX_OUTPUT: u64 = 64 << 10;
const PROPERTIES: &str = "LoadState,KillMode,Delegate,TimeoutStartUSec,MainPID";

/// Asks for `name`. *Absent* when systemd does not run this machine.
pub fn observe(name: &str) -> Seen<Unit> {
    show(name, PROPERTIES).and_then(|text| match parse(name, &text) {
        Ok(unit) => Seen::Present(unit),
        Err(why) => Seen::Unknown(why),
    })
}

/// The command that the unit `name` starts, word by word. *Absent* when systemd does not run this
/// machine; *unknown* unless it is one program with words that mean what they are.
pub fn command(name: &str) -> Seen<Vec<String>> {
    show(name, "ExecStart").and_then(|text| match parse_command(&text) {
        Ok(words) => Seen::Present(words),
        Err(why) => Seen::Unknown(format!("{name} {why}")),
    })
}

fn show(name: &str, properties: &str) -> Seen<String> {
    if !Path::new(BOOTED).is_dir() {
        return Seen::Absent;
    }
    // After `--` nothing is a flag, whatever it is called.
    let arguments = ["show", "--property", properties, "--", name];
    match command::output("systemctl", &arguments, TIMEOUT, MAX_OUTPUT) {
        Seen::Present(bytes) => Seen::Present(String::from_utf8_lossy(&bytes).into_owned()),
        Seen::Absent => Seen::Unknown("there is no systemctl in PATH".into()),
        Seen::Unknown(why) => Seen::Unknown(why),
    }
}

/// Parses `ExecStart={ path=P ; argv[]=A B C ; ignore_errors=no ; … }`. systemd prints words as
/// they are, unquoted, and variables unexpanded.
fn parse_command(text: &str) -> Result<Vec<String>, String> {
    let mut lines = text.lines().filter_map(|l| l.strip_prefix("ExecStart="));
    let (Some(line), None) = (lines.next(), lines.next()) else {
        return Err("starts nothing, or more than one program".into());
    };
    let words = line
        .split_once(" argv[]=")
        .and_then(|(_, rest)| rest.split_once(" ; "))
        .map(|(words, _)| words)
        .ok_or("has an ExecStart that is not understood")?;
    if words.contains(['$', '%', '"', '\'', '\\']) {
        return Err(format!("has variables or quotes in {words:?}"));
    }
    Ok(words.split_ascii_whitespace().map(str::to_owned).collect())
}

/// Parses `NAME=VALUE` lines. A property that is missing or not understood is an error: a
/// default would pass as fine what was not seen.
fn parse(name: &str, text: &str) -> Result<Unit, String> {
    let properties: HashMap<&str, &str> = text.lines().filter_map(|l| l.split_once('=')).collect();
    let get = |key: &str| {
        let value = properties.get(key).copied();
        value.ok_or_else(|| format!("systemctl does not tell its {key}"))
    };
    let load_state = get("LoadState")?.to_owned();
    if load_state != "loaded" {
        // The rest means nothing then.
        return Ok(Unit {
            name: name.to_owned(),
            load_state,
            kill_mode: String::new(),
            delegate: false,
            start_timeout: None,
            main_pid: None,
        });
    }
    let timeout = get("TimeoutStartUSec")?;
    let start_timeout = match timeout {
        "infinity" => None,
        text => Some(
            time_span(text).ok_or_else(|| format!("its TimeoutStartUSec {text:?} is no time"))?,
        ),
    };
    let pid: i32 = get("MainPID")?
        .parse()
        .map_err(|_| "its MainPID is no number".to_owned())?;
    Ok(Unit {
        name: name.to_owned(),
        load_state,
        kill_mode: get("KillMode")?.to_owned(),
        delegate: match get("Delegate")? {
            "yes" => true,
            "no" => false,
            other => return Err(format!("its Delegate {other:?} is neither yes nor no")),
        },
        start_timeout,
        main_pid: (pid > 0).then_some(pid),
    })
}

/// A time span as systemd prints it: `1min 30s`, `500ms`.
fn time_span(text: &str) -> Option<Duration> {
    let mut micros: u64 = 0;
    let mut words = text.split_ascii_whitespace().peekable();
    words.peek()?;
    for word in words {
        let digits = word.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = word.split_at_checked(digits)?;
        let unit: u64 = match unit {
            "us" => 1,
            "ms" => 1000,
            "s" => 1_000_000,
            "min" => 60_000_000,
            "h" => 3_600_000_000,
            "d" => 86_400_000_000,
            "w" => 604_800_000_000,
            // systemd's own idea of a month and a year (systemd.time(7)).
            "month" => 2_629_800_000_000,
            "y" => 31_557_600_000_000,
            _ => return None,
        };
        let part = number.parse::<u64>().ok()?.checked_mul(unit)?;
        micros = micros.checked_add(part)?;
    }
    Some(Duration::from_micros(micros))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_systemctl_prints_is_read_and_what_it_leaves_out_is_an_error() {
        // systemd 252: systemctl show --property … -- containerd.service
        let text = "TimeoutStartUSec=1min 30s\nMainPID=412\nKillMode=process\nDelegate=yes\n\
                    LoadState=loaded\n";
        let unit = parse("containerd.service", text).unwrap();
        assert_eq!(unit.start_timeout, Some(Duration::from_secs(90)));
        assert_eq!((unit.main_pid, unit.delegate), (Some(412), true));
        assert_eq!(unit.kill_mode, "process");
        let endless = parse("x", &text.replace("1min 30s", "infinity")).unwrap();
        assert_eq!(endless.start_timeout, None);
        assert_eq!(
            parse("x", &text.replace("412", "0")).unwrap().main_pid,
            None
        );
        assert_eq!(
            parse("x", "LoadState=not-found\n").unwrap().load_state,
            "not-found"
        );
        for line in text.lines() {
            assert!(parse("x", &text.replace(line, "")).is_err(), "{line}");
        }
        assert!(parse("x", &text.replace("30s", "30x")).is_err());
        assert!(parse("x", &text.replace("Delegate=yes", "Delegate=")).is_err());
    }

    #[test]
    fn a_command_is_one_program_with_plain_words() {
        // systemd 252: systemctl show --property ExecStart -- containerd.service
        let shown = |words: &str| {
            format!(
                "ExecStart={{ path=/usr/bin/containerd ; argv[]={words} ; ignore_errors=no ; \
                 start_time=[n/a] ; stop_time=[n/a] ; pid=0 ; code=(null) ; status=0/0 }}\n"
            )
        };
        let one = shown("/usr/bin/containerd --config /c.toml");
        assert_eq!(
            parse_command(&one).unwrap(),
            ["/usr/bin/containerd", "--config", "/c.toml"]
        );
        for bad in [
            String::new(),
            "ExecStart=\n".into(),
            "ExecStart={ path=/usr/bin/containerd ;".into(),
            format!("{one}{one}"),
            shown("/usr/bin/containerd $OPTIONS"),
            shown("/usr/bin/containerd \"--config=/with space\""),
        ] {
            assert!(parse_command(&bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn time_spans_are_systemds() {
        for (text, seconds) in [
            ("0", None),
            ("", None),
            ("s", None),
            ("5min", Some(300)),
            ("1h 1min 1s", Some(3661)),
            ("500ms", Some(0)),
            ("1d", Some(86_400)),
            ("99999999999999999y", None),
        ] {
            assert_eq!(time_span(text).map(|t| t.as_secs()), seconds, "{text:?}");
        }
    }
}
