//! Plans: what a verb is about to do, as a list of steps.
//!
//! A step is data: it can be shown (`--dry-run`), counted and timed. How a step is done and
//! undone is the executor's business; that it is undone, in reverse order, when a later one
//! fails, is [`run`]'s.

use std::{
    fmt,
    time::{Duration, Instant},
};

/// A list of steps in their order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan<S> {
    steps: Vec<S>,
}

impl<S> Default for Plan<S> {
    fn default() -> Self {
        Self { steps: Vec::new() }
    }
}

impl<S> FromIterator<S> for Plan<S> {
    fn from_iter<I: IntoIterator<Item = S>>(steps: I) -> Self {
        Self {
            steps: steps.into_iter().collect(),
        }
    }
}

impl<S> Plan<S> {
    /// The steps.
    pub fn steps(&self) -> &[S] {
        &self.steps
    }

    /// Adds a step at the end.
    pub fn push(&mut self, step: S) {
        self.steps.push(step);
    }

    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }
}

impl<S: fmt::Display> fmt::Display for Plan<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, step) in self.steps.iter().enumerate() {
            writeln!(f, "{:3}. {step}", index + 1)?;
        }
        Ok(())
    }
}

/// Does and undoes steps.
pub trait Executor<S> {
    /// Why a step failed.
    type Error;

    /// Does the step: wholly, or not at all.
    fn apply(&mut self, step: &S) -> Result<(), Self::Error>;

    /// Undoes a step that was done. What is gone already is no error.
    fn undo(&mut self, step: &S) -> Result<(), Self::Error>;

    /// Called before step `index`, and once after the last: where tests interfere.
    fn before(&mut self, index: usize) -> Result<(), Self::Error> {
        let _ = index;
        Ok(())
    }
}

/// A set-up that failed.
#[derive(Debug)]
pub struct Failure<E> {
    /// Index of the step that failed.
    pub step: usize,
    /// Why.
    pub error: E,
    /// What could not be undone: the step as shown, and why.
    pub not_undone: Vec<(String, E)>,
}

/// Sets up: does the steps in order. When one fails, undoes those before it in reverse order
/// and carries on over errors. Returns the time that each step took.
pub fn run<S: fmt::Display, X: Executor<S>>(
    plan: &Plan<S>,
    executor: &mut X,
) -> Result<Vec<Duration>, Failure<X::Error>> {
    let mut times = Vec::with_capacity(plan.steps.len());
    for (index, step) in plan.steps.iter().enumerate() {
        let start = Instant::now();
        if let Err(error) = executor.before(index).and_then(|()| executor.apply(step)) {
            return Err(Failure {
                step: index,
                error,
                not_undone: unwind(&plan.steps[..index], executor),
            });
        }
        times.push(start.elapsed());
    }
    match executor.before(plan.steps.len()) {
        Ok(()) => Ok(times),
        Err(error) => Err(Failure {
            step: plan.steps.len(),
            error,
            not_undone: unwind(&plan.steps, executor),
        }),
    }
}

fn unwind<S: fmt::Display, X: Executor<S>>(
    steps: &[S],
    executor: &mut X,
) -> Vec<(String, X::Error)> {
    let undone = steps.iter().rev();
    undone
        .filter_map(|step| Some((step.to_string(), executor.undo(step).err()?)))
        .collect()
}

/// Tears down: undoes every step of the plan that made it, in reverse order, and carries on
/// over errors. Returns what could not be undone.
pub fn tear_down<S: fmt::Display, X: Executor<S>>(
    plan: &Plan<S>,
    executor: &mut X,
) -> Result<Vec<(String, X::Error)>, X::Error> {
    let mut left = Vec::new();
    for (index, step) in plan.steps.iter().rev().enumerate() {
        executor.before(index)?;
        if let Err(error) = executor.undo(step) {
            left.push((step.to_string(), error));
        }
    }
    executor.before(plan.steps.len())?;
    Ok(left)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A world of one set; steps put numbers in.
    #[derive(Default)]
    struct World {
        there: Vec<u32>,
        fails_at: Option<usize>,
        cannot_undo: Option<u32>,
        order: Vec<u32>,
    }

    impl Executor<u32> for World {
        type Error = &'static str;

        fn apply(&mut self, step: &u32) -> Result<(), Self::Error> {
            self.there.push(*step);
            Ok(())
        }

        fn undo(&mut self, step: &u32) -> Result<(), Self::Error> {
            self.order.push(*step);
            if self.cannot_undo == Some(*step) {
                return Err("busy");
            }
            self.there.retain(|there| there != step);
            Ok(())
        }

        fn before(&mut self, index: usize) -> Result<(), Self::Error> {
            if self.fails_at == Some(index) {
                Err("injected")
            } else {
                Ok(())
            }
        }
    }

    #[test]
    fn a_failure_at_any_step_leaves_nothing() {
        let plan: Plan<u32> = (10..15).collect();
        for fails_at in 0..=5 {
            let mut world = World {
                fails_at: Some(fails_at),
                ..World::default()
            };
            let failure = run(&plan, &mut world).unwrap_err();
            assert_eq!((failure.error, failure.not_undone.len()), ("injected", 0));
            assert!(world.there.is_empty(), "{fails_at}");
            let reverse: Vec<u32> = (10..10 + fails_at as u32).rev().collect();
            assert_eq!(world.order, reverse);
        }
    }

    #[test]
    fn what_cannot_be_undone_is_listed_and_the_rest_goes() {
        let plan: Plan<u32> = (10..15).collect();
        let mut world = World {
            fails_at: Some(5),
            cannot_undo: Some(12),
            ..World::default()
        };
        let failure = run(&plan, &mut world).unwrap_err();
        assert_eq!(failure.not_undone, [("12".to_owned(), "busy")]);
        assert_eq!(world.there, [12]);
    }

    #[test]
    fn a_teardown_undoes_all_in_reverse_and_lists_what_it_could_not() {
        let plan: Plan<u32> = (10..15).collect();
        let mut world = World {
            cannot_undo: Some(11),
            ..World::default()
        };
        run(&plan, &mut world).unwrap();
        assert_eq!(
            tear_down(&plan, &mut world).unwrap(),
            [("11".to_owned(), "busy")]
        );
        assert_eq!(world.there, [11]);
        assert_eq!(world.order, [14, 13, 12, 11, 10]);
    }

    #[test]
    fn a_plan_is_shown_step_by_step() {
        assert_eq!(
            (1..3).collect::<Plan<u32>>().to_string(),
            "  1. 1\n  2. 2\n"
        );
    }
}
