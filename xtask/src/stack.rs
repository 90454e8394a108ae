//! The stack that a program takes, as old kernels count it.
//!
//! All functions of a chain of calls share 512 bytes. Linux 6.1 rounds each one's part up to
//! 32 bytes (newer ones to 16), so that what a new kernel loads may be "Too large" for an old
//! one. A function takes what lies between its frame pointer and the lowest address that it
//! reaches from there.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context as _, Result, bail, ensure};
use object::{
    File, Object as _, ObjectSection as _, ObjectSymbol as _, RelocationTarget, SymbolIndex,
    SymbolKind,
};

/// Bytes of an instruction.
const SIZE: usize = 8;
/// What a chain of calls may take.
const LIMIT: u64 = 512;
/// What the part of each function is rounded up to.
const ROUNDED: u64 = 32;

const FRAME_POINTER: u8 = 10;
/// Classes of instructions: load and store with a register and an offset.
const LDX: u8 = 1;
const ST: u8 = 2;
const STX: u8 = 3;
const ALU: u8 = 4;
const ALU64: u8 = 7;
/// `a = b` and `a += constant`, in 64 bits.
const MOVE: u8 = 0xbf;
const ADD: u8 = 0x07;
const CALL: u8 = 0x85;
/// In the source register of a call: the callee is a function of the object.
const CALL_OWN: u8 = 1;

/// Where a function begins: its section, and its address there.
type Start = (usize, u64);

struct Function {
    name: String,
    depth: u64,
    calls: BTreeSet<Start>,
}

/// Fails if an old kernel would refuse a chain of calls, and names it.
pub(crate) fn check(elf: &File<'_>) -> Result<()> {
    let functions = functions(elf)?;
    for start in functions.keys() {
        let (depth, chain) = deepest(&functions, *start, 0)?;
        let named = chain.iter().map(|function| {
            let path = function.name.split("::<").next().unwrap_or_default();
            let name = path.rsplit("::").next().unwrap_or_default();
            format!("{name} ({})", function.depth)
        });
        ensure!(
            depth <= LIMIT,
            "Linux 6.1 will refuse a chain of calls that takes {depth} bytes of stack, of {LIMIT}, \
             each part rounded up to {ROUNDED}: {}",
            named.collect::<Vec<_>>().join(", ")
        );
    }
    Ok(())
}

fn functions(elf: &File<'_>) -> Result<BTreeMap<Start, Function>> {
    let mut functions = BTreeMap::new();
    for symbol in elf
        .symbols()
        .filter(|symbol| symbol.kind() == SymbolKind::Text)
    {
        let Some(index) = symbol.section_index() else {
            continue;
        };
        let section = elf.section_by_index(index)?;
        let Some(code) = section.data_range(symbol.address(), symbol.size())? else {
            continue;
        };
        let (instructions, _) = code.as_chunks::<SIZE>();
        let relocations: BTreeMap<u64, SymbolIndex> = section
            .relocations()
            .filter_map(|(offset, relocation)| match relocation.target() {
                RelocationTarget::Symbol(symbol) => Some((offset, symbol)),
                _ => None,
            })
            .collect();
        let mut calls = BTreeSet::new();
        for (at, instruction) in instructions.iter().enumerate() {
            let [CALL, registers, _, _, immediate @ ..] = *instruction else {
                continue;
            };
            if registers >> 4 != CALL_OWN {
                continue;
            }
            let distance = i64::from(i32::from_le_bytes(immediate)) + 1;
            let offset = symbol.address() + u64::try_from(at * SIZE)?;
            let callee = match relocations.get(&offset) {
                Some(callee) => elf.symbol_by_index(*callee)?,
                None => {
                    calls.insert((index.0, offset.wrapping_add_signed(distance * 8)));
                    continue;
                }
            };
            let section = callee.section_index().context("a call leaves the object")?;
            let address = match callee.kind() {
                SymbolKind::Section => u64::try_from(distance * 8)?,
                _ => callee.address(),
            };
            calls.insert((section.0, address));
        }
        let name = format!("{:#}", rustc_demangle::demangle(symbol.name()?));
        let function = Function {
            name,
            depth: depth(instructions),
            calls,
        };
        functions.insert((index.0, symbol.address()), function);
    }
    Ok(functions)
}

/// What a function takes for itself.
fn depth(instructions: &[[u8; SIZE]]) -> u64 {
    let mut depth = 0;
    // Registers that were just set to the frame pointer.
    let mut copies = BTreeSet::new();
    for [code, registers, o0, o1, immediate @ ..] in instructions {
        let (to, from) = (registers & 0xf, registers >> 4);
        let offset = i64::from(i16::from_le_bytes([*o0, *o1]));
        let mut reach = |offset: i64| depth = depth.max(u64::try_from(-offset).unwrap_or(0));
        match code & 7 {
            LDX if from == FRAME_POINTER => reach(offset),
            ST | STX if to == FRAME_POINTER => reach(offset),
            _ if *code == MOVE && from == FRAME_POINTER => {
                copies.insert(to);
            }
            ALU | ALU64 if copies.remove(&to) && *code == ADD => {
                reach(i32::from_le_bytes(*immediate).into());
            }
            _ => {}
        }
    }
    depth
}

/// The chain of calls from a function on that takes most, and what it takes.
fn deepest(
    functions: &BTreeMap<Start, Function>,
    start: Start,
    level: usize,
) -> Result<(u64, Vec<&Function>)> {
    let function = functions
        .get(&start)
        .context("a call leads to no function")?;
    if level > functions.len() {
        bail!("{} calls itself", function.name);
    }
    let mut most = (0, Vec::new());
    for callee in &function.calls {
        let chain = deepest(functions, *callee, level + 1)?;
        if chain.0 > most.0 {
            most = chain;
        }
    }
    most.0 += function.depth.max(1).next_multiple_of(ROUNDED);
    most.1.insert(0, function);
    Ok(most)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stores_loads_and_addresses_of_the_frame_count() {
        let store = [0x7b, 0x1a, 0xf8, 0xff, 0, 0, 0, 0];
        let load = [0x79, 0xa1, 0xf0, 0xff, 0, 0, 0, 0];
        let copy = [MOVE, 0xa2, 0, 0, 0, 0, 0, 0];
        let [i0, i1, i2, i3] = (-40i32).to_le_bytes();
        let add = [ADD, 2, 0, 0, i0, i1, i2, i3];
        assert_eq!(depth(&[store]), 8);
        assert_eq!(depth(&[store, load]), 16);
        assert_eq!(depth(&[store, copy, add, load]), 40);
        // Another register's offset is none of the frame's.
        assert_eq!(depth(&[add, [0x79, 0x21, 0xc0, 0xff, 0, 0, 0, 0]]), 0);
    }
}
