//! What the documents say about the tests.

use std::{collections::BTreeSet, fs, path::Path};

/// Adds the tests of a Rust source, or of all those below a directory: rows of packets, scenarios,
/// functions of the test harness.
fn tests(path: &Path, found: &mut BTreeSet<String>) {
    if path.is_dir() {
        for entry in fs::read_dir(path).expect("a directory of this project") {
            tests(&entry.expect("an entry of it").path(), found);
        }
    } else if path.extension().is_some_and(|extension| extension == "rs") {
        let source = fs::read_to_string(path).expect("a source of this project");
        for before in ["row!(", "each_family!(", "name: \""] {
            found.extend(source.split(before).skip(1).map(first_word));
        }
        let attributed = source.split("#[test]").skip(1);
        found.extend(attributed.filter_map(|rest| Some(first_word(rest.split_once("fn ")?.1))));
    }
}

fn first_word(text: &str) -> String {
    let text = text.trim_start();
    let end = text.find(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    text[..end.unwrap_or(text.len())].to_owned()
}

#[test]
fn score_sheet_names_tests_that_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let sheet = fs::read_to_string(root.join("../docs/nat-rfc.md")).expect("the score sheet");
    let mut there = BTreeSet::new();
    tests(&root.join("src/packets/rows"), &mut there);
    tests(&root.join("tests/scenarios"), &mut there);
    tests(&root.join("tests/properties"), &mut there);
    tests(&root.join("tests/pressure.rs"), &mut there);
    tests(&root.join("../nucnet-ctl/src/model"), &mut there);
    // The names are what stands between backquotes and has underscores.
    let named: Vec<&str> = sheet
        .split('`')
        .skip(1)
        .step_by(2)
        .filter(|name| name.contains('_'))
        .collect();
    assert!(named.len() > 50, "the sheet names hardly any test");
    let missing: Vec<&&str> = named
        .iter()
        .filter(|name| !there.contains(**name))
        .collect();
    assert!(missing.is_empty(), "no such tests: {missing:?}");
}
