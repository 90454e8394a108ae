//! What the documents say about the tests.

use std::{collections::BTreeSet, fs, path::Path};

/// Adds the words of a Rust source, or of all those below a directory.
fn words(path: &Path, found: &mut BTreeSet<String>) {
    if path.is_dir() {
        for entry in fs::read_dir(path).expect("a directory of this project") {
            words(&entry.expect("an entry of it").path(), found);
        }
    } else if path.extension().is_some_and(|extension| extension == "rs") {
        let source = fs::read_to_string(path).expect("a source of this project");
        found.extend(
            source
                .split(|c: char| !c.is_ascii_alphanumeric() && c != '_')
                .map(str::to_owned),
        );
    }
}

#[test]
fn score_sheet_names_tests_that_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let sheet = fs::read_to_string(root.join("../docs/nat-rfc.md")).expect("the score sheet");
    let mut sources = BTreeSet::new();
    words(&root.join("src/packets/rows"), &mut sources);
    words(&root.join("tests/scenarios"), &mut sources);
    words(&root.join("tests/properties.rs"), &mut sources);
    words(&root.join("../nucnet-ctl/src/model"), &mut sources);
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
        .filter(|name| !sources.contains(**name))
        .collect();
    assert!(missing.is_empty(), "no such tests: {missing:?}");
}
