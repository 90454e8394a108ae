//! What creating and removing many slots costs, by nucnet and by the way before it.

use anyhow::{Result, bail};

use super::gate::{Cost, Means, cost};
use crate::lab::{Lab, seed_slots};

/// A lab in which slots come and go.
#[derive(Debug)]
pub struct Slots {
    lab: Lab,
    means: Means,
    count: u16,
}

impl Slots {
    /// Most that there can be: as the seed numbers them, but for the one that nucnet always has.
    pub const MOST: u16 = 32_766;

    /// Builds one. By nucnet it has a slot already: the programs are loaded.
    ///
    /// # Errors
    /// A command or nucnet fails.
    pub fn new(means: Means, count: u16) -> Result<Self> {
        let mut lab = Lab::new()?;
        lab.host.leave_cgroup();
        match means {
            Means::Nucnet => {
                let first = (count + 1).to_string();
                lab.nucnet(&["slot", "create", &first])?.expect(0)?;
            }
            Means::Seeds(_) => lab.host.sysctl("net/ipv4/ip_forward", "1")?,
            Means::Cni(_) => bail!("CNI knows no slots"),
        }
        Ok(Self { lab, means, count })
    }

    /// Creates them all, and removes them.
    ///
    /// # Errors
    /// A command or nucnet fails.
    pub fn pass(&mut self) -> Result<[Cost; 2]> {
        let ((), create) = cost(|| self.each("create", seed_slots::create))?;
        let ((), remove) = cost(|| self.each("remove", seed_slots::remove))?;
        self.lab.forget();
        Ok([create, remove])
    }

    fn each(
        &self,
        verb: &str,
        by_seed: impl Fn(&Lab, crate::lab::seeds::Rules, u16) -> Result<()>,
    ) -> Result<()> {
        match self.means {
            Means::Seeds(rules) => {
                (1..=self.count).try_for_each(|number| by_seed(&self.lab, rules, number))
            }
            _ => {
                let all = format!("1-{}", self.count);
                let outcome = self.lab.nucnet(&["slot", verb, &all])?;
                outcome.expect(0).map(drop)
            }
        }
    }
}
