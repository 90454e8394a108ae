//! Loops as old kernels accept them.
//!
//! Linux walks a function's instructions depth first before it verifies them (`check_cfg`).
//! Older ones take it for a loop without end when an instruction that is no jump is followed
//! by one that the walk is still coming from: a loop whose end lies before its head. What a
//! new kernel loads may thus be refused by an old one, with "back-edge from insn 59 to 60",
//! which depends on how the compiler lays out a loop and on nothing in its source.

/// Bytes of an instruction.
const SIZE: usize = 8;

const JMP: u8 = 0x05;
const JMP32: u8 = 0x06;
/// `goto` with a 16-bit offset, and with a 32-bit one.
const JA: u8 = 0x05;
const JA32: u8 = 0x06;
const CALL: u8 = 0x85;
const EXIT: u8 = 0x95;

/// How far the walk has come with an instruction.
#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    New,
    /// The walk is coming from it; the number of its ways on that it has taken.
    Open(usize),
    Done,
}

/// Pairs of instructions, by number, for which old kernels refuse a function.
pub(crate) fn refused(code: &[u8]) -> Vec<(usize, usize)> {
    let (instructions, _) = code.as_chunks::<SIZE>();
    let mut states = vec![State::New; instructions.len()];
    let mut path = Vec::new();
    let mut refused = Vec::new();
    if let Some(first) = states.first_mut() {
        *first = State::Open(0);
        path.push(0);
    }
    while let Some(&at) = path.last() {
        let State::Open(taken) = states[at] else {
            break;
        };
        let ways = ways_on(at, &instructions[at]);
        let Some(&(to, may_go_back)) = ways.get(taken) else {
            states[at] = State::Done;
            path.pop();
            continue;
        };
        states[at] = State::Open(taken + 1);
        match states.get(to) {
            Some(State::New) => {
                states[to] = State::Open(0);
                path.push(to);
            }
            Some(State::Open(_)) if !may_go_back => refused.push((at, to)),
            _ => {}
        }
    }
    refused
}

/// Where the walk goes on from an instruction, in its order, and whether it may come from
/// there.
fn ways_on(at: usize, instruction: &[u8; SIZE]) -> Vec<(usize, bool)> {
    let [code, _, offset @ .., i0, i1, i2, i3] = *instruction;
    let next = at + 1;
    let jump = |distance: i64| next.checked_add_signed(isize::try_from(distance).unwrap_or(0));
    let near = jump(i16::from_le_bytes(offset).into());
    let far = jump(i32::from_le_bytes([i0, i1, i2, i3]).into());
    match code {
        EXIT => Vec::new(),
        JA => near.map(|to| (to, true)).into_iter().collect(),
        JA32 => far.map(|to| (to, true)).into_iter().collect(),
        CALL => vec![(next, false)],
        _ if matches!(code & 7, JMP | JMP32) => [Some(next), near]
            .into_iter()
            .flatten()
            .map(|to| (to, true))
            .collect(),
        _ => vec![(next, false)],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn goto(offset: i16) -> [u8; SIZE] {
        let [low, high] = offset.to_le_bytes();
        [JA, 0, low, high, 0, 0, 0, 0]
    }

    fn goto_if_zero(offset: i16) -> [u8; SIZE] {
        let [low, high] = offset.to_le_bytes();
        [0x15, 1, low, high, 0, 0, 0, 0]
    }

    const ADD: [u8; SIZE] = [0x07, 1, 0, 0, 1, 0, 0, 0];
    const END: [u8; SIZE] = [EXIT, 0, 0, 0, 0, 0, 0, 0];

    #[test]
    fn loop_that_jumps_back_is_accepted() {
        let code = [ADD, goto_if_zero(-2), END];
        assert_eq!(refused(code.as_flattened()), []);
    }

    #[test]
    fn loop_whose_end_lies_before_its_head_is_refused() {
        // goto head; end: add; head: if zero goto end; exit
        let code = [goto(1), ADD, goto_if_zero(-2), END];
        assert_eq!(refused(code.as_flattened()), [(1, 2)]);
    }

    #[test]
    fn branches_that_meet_are_no_loop() {
        let code = [goto_if_zero(1), ADD, ADD, END];
        assert_eq!(refused(code.as_flattened()), []);
    }
}
