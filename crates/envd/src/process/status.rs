//! How a process ended, in the words of Go's `os.ProcessState`, which SDKs show.

use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

use nidus_envd_protocol::process::process_event::EndEvent;

/// The end event of this status.
pub fn end_event(status: ExitStatus) -> EndEvent {
    match (status.code(), status.signal()) {
        (Some(0), _) => EndEvent { exit_code: 0, exited: true, status: "exit status 0".into(), error: None },
        (Some(code), _) => {
            let text = format!("exit status {code}");
            EndEvent { exit_code: code, exited: true, error: Some(text.clone()), status: text }
        }
        (None, signal) => {
            let core = if status.core_dumped() { " (core dumped)" } else { "" };
            let text = format!("signal: {}{core}", signal_name(signal.unwrap_or(0)));
            EndEvent { exit_code: -1, exited: false, error: Some(text.clone()), status: text }
        }
    }
}

/// signal(7), with Go's words for the common ones.
fn signal_name(signal: i32) -> String {
    let name = match signal {
        1 => "hangup",
        2 => "interrupt",
        3 => "quit",
        4 => "illegal instruction",
        5 => "trace/breakpoint trap",
        6 => "aborted",
        7 => "bus error",
        8 => "floating point exception",
        9 => "killed",
        10 => "user defined signal 1",
        11 => "segmentation fault",
        12 => "user defined signal 2",
        13 => "broken pipe",
        14 => "alarm clock",
        15 => "terminated",
        n => return format!("signal {n}"),
    };
    name.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_are_told_as_go_does() {
        let of = |raw| end_event(ExitStatus::from_raw(raw));
        assert_eq!((of(0).exit_code, of(0).error), (0, None));
        assert_eq!(of(3 << 8).error.as_deref(), Some("exit status 3"));
        let killed = of(9);
        assert_eq!((killed.exit_code, killed.exited, killed.status.as_str()), (-1, false, "signal: killed"));
    }
}
