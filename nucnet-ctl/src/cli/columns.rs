//! Aligned columns, also of very many lines: the cells are one string.

use std::{
    fmt::{self, Display, Write as _},
    io::{self, Write},
};

/// Lines of `N` cells.
pub(super) struct Columns<const N: usize> {
    text: String,
    /// Where each cell ends.
    ends: Vec<usize>,
    widths: [usize; N],
}

impl<const N: usize> Columns<N> {
    /// With titles.
    pub(super) fn new(titles: [&str; N]) -> Self {
        let mut columns = Self {
            text: String::new(),
            ends: Vec::new(),
            widths: [0; N],
        };
        columns.line(titles.each_ref().map(|title| title as &dyn Display));
        columns
    }

    /// Adds a line.
    pub(super) fn line(&mut self, cells: [&dyn Display; N]) {
        for (cell, width) in cells.into_iter().zip(&mut self.widths) {
            let start = self.text.len();
            // A string takes all that is written to it.
            let _: fmt::Result = write!(self.text, "{cell}");
            *width = (*width).max(self.text.len() - start);
            self.ends.push(self.text.len());
        }
    }

    /// Prints all, two spaces between columns.
    pub(super) fn print(&self, out: &mut dyn Write) -> io::Result<()> {
        let widest = self.widths.iter().max().copied().unwrap_or(0);
        let spaces = " ".repeat(widest + 2);
        let mut start = 0;
        for line in self.ends.chunks_exact(N) {
            let mut gap = 0;
            for (&end, width) in line.iter().zip(self.widths) {
                out.write_all(&spaces.as_bytes()[..gap])?;
                out.write_all(&self.text.as_bytes()[start..end])?;
                gap = width - (end - start) + 2;
                start = end;
            }
            out.write_all(b"\n")?;
        }
        Ok(())
    }
}

/// A cell: something, or what stands for nothing.
pub(super) struct Or<T>(pub(super) Option<T>, pub(super) &'static str);

impl<T: Display> Display for Or<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Some(it) => it.fmt(f),
            None => f.write_str(self.1),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell_and_the_last_has_no_spaces_after_it() {
        let mut columns = Columns::new(["A", "LONG", "B"]);
        columns.line([&100, &"x", &"y"]);
        let mut out = Vec::new();
        columns.print(&mut out).expect("a vector takes all");
        assert_eq!(out, b"A    LONG  B\n100  x     y\n");
    }
}
