//! Numbers and tables as a page shows them.

/// With commas between thousands.
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut grouped = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

/// A table of Markdown.
pub struct Table {
    text: String,
}

impl Table {
    pub fn new(head: &[&str]) -> Self {
        let mut table = Self {
            text: String::new(),
        };
        table.row(head.iter().map(ToString::to_string));
        table.row(head.iter().map(|_| "---".to_owned()));
        table
    }

    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        for cell in cells {
            self.text += "| ";
            self.text += &cell;
            self.text += " ";
        }
        self.text += "|\n";
    }

    pub fn text(self) -> String {
        self.text
    }
}

/// What is not known is a `-`.
pub fn or_dash<T: ToString>(value: Option<T>) -> String {
    value.map_or("-".to_owned(), |value| value.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thousands_are_told_apart() {
        for (number, text) in [
            (0, "0"),
            (999, "999"),
            (1000, "1,000"),
            (1_234_567, "1,234,567"),
        ] {
            assert_eq!(grouped(number), text);
        }
    }

    #[test]
    fn a_table_has_a_line_below_its_head() {
        let mut table = Table::new(&["a", "b"]);
        table.row(["1".to_owned(), or_dash(None::<u8>)]);
        assert_eq!(table.text(), "| a | b |\n| --- | --- |\n| 1 | - |\n");
    }
}
