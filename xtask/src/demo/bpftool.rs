//! What bpftool prints, on fewer lines.

use anyhow::{Context as _, Result};

/// Longest line of fields.
const WIDTH: usize = 72;

/// The element of a dumped map that contains a text, with as many fields on a line as there is
/// room for.
pub(super) fn element_with(dump: &str, text: &str) -> Result<String> {
    let mut elements = dump
        .split("\n    },{")
        .filter(|element| element.contains(text));
    let element = elements
        .next()
        .with_context(|| format!("no element has {text}"))?;
    let element = element.trim_start_matches("[{");
    let mut lines: Vec<String> = Vec::new();
    let mut depth = 0;
    // Whether the last line takes more fields.
    let mut open = false;
    let pieces = element.lines().map(str::trim);
    for piece in pieces.filter(|piece| !piece.is_empty()) {
        let ends = piece.starts_with('}');
        if ends && depth == 0 {
            break;
        }
        depth -= usize::from(ends);
        let begins = piece.ends_with('{');
        let alone = begins || ends || piece.contains('[');
        match lines.last_mut() {
            Some(last) if piece.starts_with(']') => last.push_str(piece),
            Some(last) if open && !alone && last.len() + 1 + piece.len() <= WIDTH => {
                last.push(' ');
                last.push_str(piece);
            }
            _ => {
                lines.push(format!("{:1$}{piece}", "", 2 * depth));
                open = !alone;
            }
        }
        depth += usize::from(begins);
    }
    Ok(lines.join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_share_lines_and_arrays_have_one_of_their_own() {
        let dump = "\
[{
        \"key\": {
            \"endpoint\": 1
        }
    },{
        \"key\": {
            \"endpoint\": 2,
            \"protocol\": 6,
            \"inside\": [0,0,10,0,42,12
            ],
            \"inside_port\": 80,
            \"peer_port\": 54212
        },
        \"value\": {
            \"state\": 4
        }
    }
]
";
        let shown = "\
\"key\": {
  \"endpoint\": 2, \"protocol\": 6,
  \"inside\": [0,0,10,0,42,12],
  \"inside_port\": 80, \"peer_port\": 54212
},
\"value\": {
  \"state\": 4
}";
        assert_eq!(element_with(dump, "10,0,42,12").unwrap(), shown);
    }

    #[test]
    fn element_that_is_not_there_is_an_error() {
        assert!(element_with("[]\n", "10,0,42,12").is_err());
    }
}
