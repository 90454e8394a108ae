//! From what is there to what is wanted.

use super::{CHAIN_PREFIX, Chain, Saved, Table, jump};
use std::fmt::Write;

/// What `iptables-restore --noflush --counters` is told.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Change {
    /// The input; empty: all is as wanted.
    pub text: String,
    /// What is not as wanted, for people.
    pub differences: Vec<String>,
}

impl Change {
    /// Whether all is as wanted.
    pub fn is_none(&self) -> bool {
        self.text.is_empty()
    }
}

/// What makes of the rules that are there those that are wanted. Rules of others are neither
/// changed nor moved.
pub fn change(saved: &Saved, wanted: &[Chain]) -> Change {
    let mut change = Change::default();
    for table in Table::ALL {
        table_change(saved, wanted, table, &mut change);
    }
    change
}

/// What takes the rules out of the chain that one of the kernel's leads to.
pub fn emptied(table: Table, hook: &str) -> String {
    format!("*{}\n:{CHAIN_PREFIX}{hook} - [0:0]\nCOMMIT\n", table.name())
}

fn table_change(saved: &Saved, wanted: &[Chain], table: Table, change: &mut Change) {
    let wanted = wanted.iter().filter(|chain| chain.table == table);
    let wanted: Vec<&Chain> = wanted.filter(|chain| !chain.is_empty()).collect();
    let is_as_wanted = |chain: &&&Chain| {
        let found = saved.fingerprint(table, &chain.name);
        found == Some((chain.fingerprint().as_str(), chain.len()))
    };
    let written: Vec<&&Chain> = wanted.iter().filter(|chain| !is_as_wanted(chain)).collect();
    let gone: Vec<&str> = saved
        .own(table)
        .filter(|name| wanted.iter().all(|chain| chain.name != *name))
        .collect();

    let (mut declarations, mut rules) = (String::new(), String::new());
    let mut note = |what: String| {
        let difference = format!("{what} of table {}", table.name());
        change.differences.push(difference);
    };
    for chain in &written {
        let _ = writeln!(declarations, ":{} - [0:0]", chain.name);
        let mut counts = saved.counts(table, &chain.name);
        for line in chain.lines(|comment| counts.get_mut(comment)?.pop_front()) {
            let _ = writeln!(rules, "{line}");
        }
        note(format!("chain {}", chain.name));
    }
    for hook in table.hooks() {
        let target = format!("{CHAIN_PREFIX}{hook}");
        let is_wanted = wanted.iter().any(|chain| chain.name == target);
        let found = saved.jumps(table, hook);
        if is_wanted && found == 0 {
            let place = saved.leading(table, hook) + 1;
            let arguments = jump(hook).replacen(hook, &format!("{hook} {place}"), 1);
            let _ = writeln!(rules, "-I {arguments}");
            note(format!("the jump from chain {hook}"));
        }
        // By what they are, never by their place; each deletes one.
        for _ in usize::from(is_wanted)..found {
            let _ = writeln!(rules, "-D {}", jump(hook));
            note(format!("a jump from chain {hook} too many"));
        }
    }
    for name in &gone {
        // Declared, it is empty, and there whatever became of it in the meantime.
        let _ = writeln!(declarations, ":{name} - [0:0]");
        let _ = writeln!(rules, "-X {name}");
        note(format!("chain {name}, which nobody needs,"));
    }
    if !(declarations.is_empty() && rules.is_empty()) {
        let _ = write!(
            change.text,
            "*{}\n{declarations}{rules}COMMIT\n",
            table.name()
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chain(name: &str, matches: &str) -> Chain {
        let mut chain = Chain::new(Table::Filter, name);
        chain.rule(matches, "web policy", "-j DROP");
        chain
    }

    /// What `iptables-save -c` would print after a change.
    fn after(text: &str) -> Saved {
        let lines = text.lines().filter(|line| !line.starts_with("-X"));
        let text = lines
            .map(|line| match line.strip_prefix("-I FORWARD 1") {
                Some(rest) => format!("-A FORWARD{rest}\n"),
                None => format!("{line}\n"),
            })
            .collect::<String>();
        Saved::parse(&text)
    }

    #[test]
    fn what_is_there_is_not_written_again() {
        let wanted = [chain("NUCNET-FORWARD", "-i nucnet0")];
        let first = change(&Saved::default(), &wanted);
        let fingerprint = wanted[0].fingerprint();
        let expected = format!(
            "*filter\n:NUCNET-FORWARD - [0:0]\n\
             -A NUCNET-FORWARD -i nucnet0 -m comment --comment \"nucnet:web policy ={fingerprint}\" -j DROP\n\
             -I FORWARD 1 -m comment --comment \"nucnet:jump\" -j NUCNET-FORWARD\nCOMMIT\n"
        );
        assert_eq!(first.text, expected);
        assert!(change(&after(&first.text), &wanted).is_none());
    }

    #[test]
    fn only_chains_that_change_are_written_and_their_counts_stay() {
        let wanted = [
            chain("NUCNET-FORWARD", ""),
            chain("NUCNET-1", "-d 10.0.0.1/32"),
        ];
        let text = change(&Saved::default(), &wanted).text;
        let counted = text.replace("-A NUCNET-1 ", "[4:240] -A NUCNET-1 ");
        let other = [wanted[0].clone(), chain("NUCNET-1", "-d 10.0.0.2/32")];
        let change = change(&after(&counted), &other);
        assert!(
            change.text.contains("[4:240] -A NUCNET-1 -d 10.0.0.2/32"),
            "{}",
            change.text
        );
        assert!(!change.text.contains("NUCNET-FORWARD"), "{}", change.text);
    }

    #[test]
    fn rules_with_one_comment_keep_their_own_counts() {
        let mut wanted = chain("NUCNET-1", "-d 10.0.0.1/32");
        wanted.rule("-d 10.0.0.2/32", "web policy", "-j DROP");
        let text = change(&Saved::default(), &[wanted.clone()]).text;
        let counted = text
            .replace("-A NUCNET-1 -d 10.0.0.1", "[1:10] -A NUCNET-1 -d 10.0.0.1")
            .replace("-A NUCNET-1 -d 10.0.0.2", "[2:20] -A NUCNET-1 -d 10.0.0.2");
        wanted.rule("-d 10.0.0.3/32", "web policy", "-j DROP");
        let text = change(&after(&counted), &[wanted]).text;
        assert!(text.contains("[1:10] -A NUCNET-1 -d 10.0.0.1"), "{text}");
        assert!(text.contains("[2:20] -A NUCNET-1 -d 10.0.0.2"), "{text}");
        assert!(text.contains("\n-A NUCNET-1 -d 10.0.0.3"), "{text}");
    }

    #[test]
    fn nothing_wanted_takes_everything_away_and_nothing_else() {
        let wanted = [chain("NUCNET-FORWARD", ""), chain("NUCNET-1", "")];
        let saved = after(&change(&Saved::default(), &wanted).text);
        let expected = "*filter\n:NUCNET-1 - [0:0]\n:NUCNET-FORWARD - [0:0]\n\
             -D FORWARD -m comment --comment \"nucnet:jump\" -j NUCNET-FORWARD\n\
             -X NUCNET-1\n-X NUCNET-FORWARD\nCOMMIT\n";
        assert_eq!(change(&saved, &[]).text, expected);
    }

    #[test]
    fn a_chain_that_lost_a_rule_is_written_again() {
        let mut wanted = chain("NUCNET-FORWARD", "-i nucnet0");
        wanted.rule("", "web", "-j ACCEPT");
        let wanted = [wanted];
        let text = change(&Saved::default(), &wanted).text;
        let without = text.lines().filter(|line| !line.contains("-j ACCEPT"));
        let without: String = without.map(|line| format!("{line}\n")).collect();
        assert!(!change(&after(&without), &wanted).is_none());
    }

    #[test]
    fn administrators_have_their_say_first() {
        let text = "*filter\n:FORWARD DROP [0:0]\n-A FORWARD -j DOCKER-USER\n\
             -A FORWARD -j DOCKER-FORWARD\nCOMMIT\n";
        let wanted = [chain("NUCNET-FORWARD", "")];
        let change = change(&Saved::parse(text), &wanted);
        assert!(
            change.text.contains("\n-I FORWARD 2 -m comment"),
            "{}",
            change.text
        );
    }

    #[test]
    fn a_second_jump_is_taken_away() {
        let wanted = [chain("NUCNET-FORWARD", "")];
        let text = change(&Saved::default(), &wanted).text;
        let twice = text.replace("COMMIT", &format!("-A {}\nCOMMIT", jump("FORWARD")));
        let expected = format!("*filter\n-D {}\nCOMMIT\n", jump("FORWARD"));
        assert_eq!(change(&after(&twice), &wanted).text, expected);
    }
}
