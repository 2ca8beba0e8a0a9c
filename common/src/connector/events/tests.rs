use super::*;
use proptest::prelude::*;

// Recorded on Linux 6.18, x86-64 (so in the byte order of little-endian machines), with a socket
// that had subscribed as 4711: the answer; `sh -c 'exit 23'` begins and ends; a process is killed.
const ANSWERED: &str = "4c000000030000001400000000000000010000000100000014000000681200002800000000000000\
     00000000b3dbb04dbb020000000000000000000000000000000000000000000000000000";
const EXECED: &str = "4c000000030000001600000000000000010000000100000016000000000000002800000002000000\
     00000000c1d8fe4dbb020000032100000321000000000000000000000000000000000000";
const EXITED: &str = "4c000000030000001700000000000000010000000100000017000000000000002800000000000080\
     0000000058ae074ebb02000003210000032100000017000011000000b51f0000b51f0000";
const KILLED: &str = "4c000000030000002300000000000000010000000100000023000000000000002800000000000080\
     01000000e194254ebb02000004210000042100000900000011000000b51f0000b51f0000";
const SHELL: i32 = 8451;
const VICTIM: i32 = 8452;

fn bytes(hex: &str) -> Vec<u8> {
    let digits = hex.as_bytes().chunks(2);
    let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
    digits.map(byte).collect()
}

fn exit(pid: i32, tgid: i32, status: i32) -> Event {
    Event::Exit { pid, tgid, status }
}

#[cfg(target_endian = "little")]
#[test]
fn what_a_kernel_really_said_is_understood() {
    let all = [ANSWERED, EXECED, EXITED, KILLED].map(bytes).concat();
    let expected = [
        Event::Answer { to: 4711, error: 0 },
        Event::Exec { tgid: SHELL },
        exit(SHELL, SHELL, 23 << 8),
        exit(VICTIM, VICTIM, 9),
    ];
    assert_eq!(parse(&all), expected);
    let mut ledger = Ledger::default();
    for event in expected {
        ledger.take(event);
    }
    assert_eq!(ledger.answer(), Some(0));
    assert_eq!(ledger.told(SHELL), Told::Status(0x1700));
    assert_eq!(ledger.told(VICTIM), Told::Status(9));
    assert_eq!(ledger.told(1), Told::Nothing);
}

#[cfg(target_endian = "little")]
#[test]
fn a_message_of_another_kind_or_cut_anywhere_says_nothing() {
    let whole = bytes(EXITED);
    for length in 0..whole.len() {
        let mut short = whole[..length].to_vec();
        assert_eq!(parse(&short), [], "{length}");
        // And one that says that it were whole.
        if let Some(said) = short.first_chunk_mut::<4>() {
            *said = u32::try_from(length).unwrap().to_ne_bytes();
            assert_eq!(parse(&short), [], "{length}");
        }
    }
    // Kind, group, value, what.
    for at in [4, 16, 20, 36] {
        let mut other = whole.clone();
        other[at] ^= 4;
        assert_eq!(parse(&other), [], "{at}");
    }
    let mut endless = whole.clone();
    endless[..4].copy_from_slice(&0_u32.to_ne_bytes());
    assert_eq!(parse(&endless), []);
}

proptest! {
    #[test]
    fn no_message_brings_down_who_reads_it(
        noise in prop::collection::vec(any::<u8>(), 0..200),
        at in 0..152_usize,
    ) {
        parse(&noise);
        let mut bent = [bytes(EXITED), bytes(KILLED)].concat();
        let end = bent.len().min(at + noise.len());
        bent[at..end].copy_from_slice(&noise[..end - at]);
        let mut ledger = Ledger::default();
        for event in parse(&bent) {
            ledger.take(event);
        }
    }
}

#[test]
fn a_request_has_the_form_that_every_kernel_takes() {
    let message = request(LISTEN, 4711);
    assert_eq!(message.len(), 40);
    assert_eq!(number(&message, 0), Some(40));
    assert_eq!(number(&message, 28), Some(4711));
    assert_eq!(number(&message, 36), Some(1));
}

#[test]
fn the_last_word_on_the_whole_process_counts() {
    let told = |events: &[Event]| {
        let mut ledger = Ledger::default();
        for event in events {
            ledger.take(*event);
        }
        ledger.told(7)
    };
    let ended = exit(7, 7, 0x100);
    assert_eq!(told(&[]), Told::Nothing);
    // Other threads come and go before.
    assert_eq!(told(&[exit(8, 7, 0)]), Told::Nothing);
    assert_eq!(told(&[exit(8, 7, 0), ended]), Told::Status(0x100));
    // All of them end with the process.
    assert_eq!(told(&[ended, exit(8, 7, 0x100)]), Told::Status(0x100));
    // The first thread had ended before the process did.
    assert_eq!(told(&[ended, exit(8, 7, 0x500)]), Told::Unclear);
    // Another thread became another program, in the first one's place.
    let exec = Event::Exec { tgid: 7 };
    assert_eq!(told(&[ended, exec]), Told::Nothing);
    assert_eq!(told(&[exit(7, 7, 9), exec, ended]), Told::Status(0x100));
}

#[test]
fn after_a_loss_nothing_is_known_but_what_comes_then() {
    let mut ledger = Ledger::default();
    ledger.take(exit(7, 7, 0));
    ledger.lose();
    assert_eq!((ledger.told(7), ledger.has_lost()), (Told::Nothing, true));
    ledger.take(exit(8, 8, 9));
    assert_eq!(ledger.told(8), Told::Status(9));
    ledger.keep(&[7]);
    assert_eq!(ledger.told(8), Told::Nothing);
}

/// What the kernel's machine does with these programs.
fn passes(program: &[libc::sock_filter], message: &[u8]) -> bool {
    let (mut at, mut word) = (0, 0);
    loop {
        let step = program[at];
        at += 1;
        match u32::from(step.code) {
            0x20 => word = u32::from_be_bytes(*message[step.k as usize..].first_chunk().unwrap()),
            0x15 => at += usize::from(if word == step.k { step.jt } else { step.jf }),
            0x06 => return step.k > 0,
            other => panic!("{other:#x}"),
        }
    }
}

#[cfg(target_endian = "little")]
#[test]
fn the_filter_lets_through_what_is_wanted_only() {
    let [answer, exec, exit, killed] = [ANSWERED, EXECED, EXITED, KILLED].map(bytes);
    let mut fork = exit.clone();
    fork[36..40].copy_from_slice(&1_u32.to_ne_bytes());
    let wide = filter(None);
    let narrow = filter(Some(&[1, SHELL]));
    let empty = filter(Some(&[]));
    for (message, seen) in [
        (&answer, [true, false, false]),
        (&exec, [true, true, false]),
        (&exit, [true, true, false]),
        (&killed, [true, false, false]),
        (&fork, [false, false, false]),
    ] {
        let programs = [&wide, &narrow, &empty];
        assert_eq!(programs.map(|program| passes(program, message)), seen);
    }
    let many: Vec<i32> = (1..3000).collect();
    let all = filter(Some(&many));
    assert!(all.len() < 10 && passes(&all, &killed) && !passes(&all, &fork));
}
