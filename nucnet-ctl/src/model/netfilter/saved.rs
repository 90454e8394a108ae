//! What `iptables-save -c` prints.

use super::{CHAIN_PREFIX, COMMENT_PREFIX, DROP_PREFIX, JUMP_COMMENT, Table, owner_and_remark};
use std::collections::{BTreeMap, VecDeque};

/// What came to a rule.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Dropped {
    /// Packets.
    pub packets: u64,
    /// Bytes, without link-layer headers.
    pub bytes: u64,
}

/// A rule that is there.
#[derive(Clone, Debug, PartialEq, Eq)]
struct SavedRule {
    arguments: Vec<String>,
    count: Dropped,
}

impl SavedRule {
    /// The value of an option.
    fn value(&self, option: &str) -> Option<&str> {
        let at = self.arguments.iter().position(|word| word == option)?;
        self.arguments.get(at + 1).map(String::as_str)
    }

    fn comment(&self) -> &str {
        self.value("--comment").unwrap_or_default()
    }

    /// Its comment without the fingerprint of its chain.
    fn said(&self) -> &str {
        let comment = self.comment();
        comment.split(" =").next().unwrap_or(comment)
    }

    /// Whether it leads to nucnet's chain for that hook, and to nothing else.
    fn is_jump(&self, hook: &str) -> bool {
        let target = format!("{CHAIN_PREFIX}{hook}");
        let wanted = ["-m", "comment", "--comment", JUMP_COMMENT, "-j", &target];
        self.arguments == wanted
    }
}

/// The rules of one family.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Saved {
    chains: BTreeMap<(Table, String), Vec<SavedRule>>,
}

impl Saved {
    /// Reads what `iptables-save -c` printed. What is in other tables is not nucnet's.
    pub fn parse(text: &str) -> Self {
        let mut saved = Self::default();
        let mut table = None;
        for line in text.lines() {
            if let Some(name) = line.strip_prefix('*') {
                table = Table::ALL.into_iter().find(|table| table.name() == name);
                continue;
            }
            let Some(table) = table else { continue };
            if let Some(declaration) = line.strip_prefix(':') {
                let name = declaration.split(' ').next().unwrap_or_default();
                saved.chains.entry((table, name.to_owned())).or_default();
                continue;
            }
            let (count, rule) = counted(line);
            let mut words = words(rule).into_iter();
            if words.next().as_deref() == Some("-A")
                && let Some(chain) = words.next()
            {
                let chain = saved.chains.entry((table, chain)).or_default();
                chain.push(SavedRule {
                    arguments: words.collect(),
                    count,
                });
            }
        }
        saved
    }

    fn chain(&self, table: Table, name: &str) -> &[SavedRule] {
        let chain = self.chains.get(&(table, name.to_owned()));
        chain.map_or(&[], Vec::as_slice)
    }

    /// Fingerprint and number of rules of a chain; none: it is not there, or not as nucnet
    /// writes chains.
    pub(super) fn fingerprint(&self, table: Table, name: &str) -> Option<(&str, usize)> {
        let rules = self.chain(table, name);
        let (_, fingerprint) = rules.first()?.comment().rsplit_once(" =")?;
        Some((fingerprint, rules.len()))
    }

    /// The chains of nucnet's in a table.
    pub(super) fn own(&self, table: Table) -> impl Iterator<Item = &str> {
        let names = self.chains.keys().filter(move |(of, _)| *of == table);
        names
            .map(|(_, name)| name.as_str())
            .filter(|name| name.starts_with(CHAIN_PREFIX))
    }

    /// How many rules lead from a chain of the kernel's to nucnet's, and whether the first place
    /// that is nucnet's to have is theirs.
    pub(super) fn jumps(&self, table: Table, hook: &str) -> usize {
        let rules = self.chain(table, hook);
        rules.iter().filter(|rule| rule.is_jump(hook)).count()
    }

    /// How many rules at the beginning of a chain of the kernel's come before nucnet's: one that
    /// leads to what an administrator wants of everything that Docker and others forward.
    pub(super) fn leading(&self, table: Table, hook: &str) -> usize {
        let rules = self.chain(table, hook);
        let is_administrators = |rule: &&SavedRule| rule.arguments == ["-j", "DOCKER-USER"];
        rules.iter().take_while(is_administrators).count()
    }

    /// Whether somebody else has rules, or a policy other than to accept.
    pub fn has_foreign(text: &str) -> bool {
        text.lines().any(|line| {
            let is_policy = line.starts_with(':') && line.contains(" DROP ");
            let is_rule = counted(line).1.starts_with("-A ");
            is_policy || is_rule && !line.contains(COMMENT_PREFIX)
        })
    }

    /// Whether anything of nucnet's is there.
    pub fn has_own(&self) -> bool {
        Table::ALL.into_iter().any(|table| {
            let hooks = table.hooks();
            self.own(table).next().is_some() || hooks.iter().any(|hook| self.jumps(table, hook) > 0)
        })
    }

    /// Whether there is a chain of nucnet's that one of the kernel's leads to.
    pub fn has_hook(&self, table: Table, hook: &str) -> bool {
        let mut own = self.own(table);
        own.any(|name| name.strip_prefix(CHAIN_PREFIX) == Some(hook))
    }

    /// What came to the rules of a chain of nucnet's, by their comments: of those with the same
    /// one, in their order.
    pub(super) fn counts(&self, table: Table, chain: &str) -> BTreeMap<&str, VecDeque<Dropped>> {
        let mut counts = BTreeMap::<&str, VecDeque<Dropped>>::new();
        for rule in self.chain(table, chain) {
            let comment = rule.comment();
            let comment = comment.split(" =").next().unwrap_or(comment);
            counts.entry(comment).or_default().push_back(rule.count);
        }
        counts
    }

    /// What rules of an owner's have counted that lead elsewhere: the connections that came by a
    /// mapping.
    pub fn translated(&self, owner: &str, target: &str) -> u64 {
        let rules = self.of_owner(owner);
        let rules = rules.filter(|rule| rule.value("-j") == Some(target));
        rules.map(|rule| rule.count.packets).sum()
    }

    /// What rules of an owner's have counted that decide nothing.
    pub fn counted(&self, owner: &str) -> Dropped {
        let rules = self.of_owner(owner);
        let rules = rules.filter(|rule| rule.value("-j").is_none() && rule.value("-g").is_none());
        rules.fold(Dropped::default(), |sum, rule| Dropped {
            packets: sum.packets.saturating_add(rule.count.packets),
            bytes: sum.bytes.saturating_add(rule.count.bytes),
        })
    }

    fn of_owner(&self, owner: &str) -> impl Iterator<Item = &SavedRule> {
        self.chains
            .values()
            .flatten()
            .filter(move |rule| rule.said().strip_prefix(COMMENT_PREFIX) == Some(owner))
    }

    /// What was dropped of an owner's, by reason: the rules whose comments name both.
    pub fn dropped(&self, owner: &str) -> BTreeMap<String, Dropped> {
        let mut dropped = BTreeMap::<String, Dropped>::new();
        for rule in self.chains.values().flatten() {
            let Some((whose, reason)) = owner_and_remark(rule.said()) else {
                continue;
            };
            let ends = rule.value("-g");
            let drops = matches!(rule.value("-j"), Some("DROP" | "REJECT"))
                || ends.is_some_and(|chain| chain.starts_with(DROP_PREFIX));
            if whose == owner && drops && rule.count.packets > 0 {
                let count = dropped.entry(reason.to_owned()).or_default();
                count.packets = count.packets.saturating_add(rule.count.packets);
                count.bytes = count.bytes.saturating_add(rule.count.bytes);
            }
        }
        dropped
    }
}

/// `[PACKETS:BYTES] RULE`, or a rule alone.
fn counted(line: &str) -> (Dropped, &str) {
    let split = || {
        let (counts, rule) = line.strip_prefix('[')?.split_once("] ")?;
        let (packets, bytes) = counts.split_once(':')?;
        let count = Dropped {
            packets: packets.parse().ok()?,
            bytes: bytes.parse().ok()?,
        };
        Some((count, rule))
    };
    split().unwrap_or((Dropped::default(), line))
}

/// The words of a rule; in quotation marks, a backslash takes the next character as it is.
fn words(line: &str) -> Vec<String> {
    let (mut words, mut word, mut is_quoted) = (Vec::new(), None::<String>, false);
    let mut characters = line.chars();
    while let Some(character) = characters.next() {
        match character {
            '"' => {
                is_quoted = !is_quoted;
                word.get_or_insert_default();
            }
            '\\' if is_quoted => word.get_or_insert_default().extend(characters.next()),
            ' ' if !is_quoted => words.extend(word.take()),
            character => word.get_or_insert_default().push(character),
        }
    }
    words.extend(word);
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_are_words_whatever_is_in_them() {
        let line = r#"-A FORWARD -m comment --comment "it's \"10\" =x" -j ACCEPT"#;
        let expected = [
            "-A",
            "FORWARD",
            "-m",
            "comment",
            "--comment",
            "it's \"10\" =x",
            "-j",
            "ACCEPT",
        ];
        assert_eq!(words(line), expected);
    }

    #[test]
    fn a_rule_that_is_almost_the_jump_is_none() {
        let text = "*filter\n:FORWARD DROP [0:0]\n\
            [5:60] -A FORWARD -m comment --comment \"nucnet:jump\" -j NUCNET-FORWARD\n\
            [0:0] -A FORWARD -i eth0 -m comment --comment \"nucnet:jump\" -j NUCNET-FORWARD\n\
            [0:0] -A FORWARD -m comment --comment \"nucnet:jump\" -j NUCNET-FORWARD-X\n\
            [0:0] -A FORWARD -m comment --comment \"nucnet:jump2\" -j NUCNET-FORWARD\nCOMMIT\n";
        let saved = Saved::parse(text);
        assert_eq!(saved.jumps(Table::Filter, "FORWARD"), 1);
        assert_eq!(saved.jumps(Table::Filter, "INPUT"), 0);
    }

    #[test]
    fn drops_are_counted_for_their_owner_and_no_other() {
        let text = "*filter\n:NUCNET-1-DENY - [0:0]\n\
            [7:420] -A NUCNET-1-DENY -m comment --comment \"nucnet:web policy =00\" -j DROP\n\
            [9:540] -A NUCNET-1-DENY -m comment --comment \"nucnet:web2 policy\" -j DROP\n\
            [3:180] -A NUCNET-1-DENY -m comment --comment \"nucnet:web policy\" -j NFLOG\n\
            [2:80] -A NUCNET-1 -m comment --comment \"nucnet:web martian\" -g NUCNET-DROP-martian\n\
            [1:40] -A NUCNET-1 -m comment --comment \"nucnet:web rule 1\" -g NUCNET-1-DENY\nCOMMIT\n";
        let dropped = Saved::parse(text).dropped("web");
        let packets = |packets, bytes| Dropped { packets, bytes };
        let expected = [("martian", packets(2, 80)), ("policy", packets(7, 420))];
        let expected = expected.map(|(reason, count)| (reason.to_owned(), count));
        assert_eq!(dropped, BTreeMap::from(expected));
    }
}
