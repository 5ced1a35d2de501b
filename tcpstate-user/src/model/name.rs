//! The fixed vocabularies of the contract: each value has one spelling, used in every output and on input.

use std::fmt;

/// A closed set of values, each with its one spelling in JSON, CSV, labels and filters.
pub trait Named: Copy + PartialEq + 'static {
    /// What the values are, for error messages.
    const WHAT: &'static str;
    /// All values, in the order in which they are listed to users.
    const ALL: &'static [Self];

    fn name(self) -> &'static str;

    /// # Errors
    /// [`UnknownName`], which lists what is known.
    fn from_name(name: &str) -> Result<Self, UnknownName> {
        Self::ALL
            .iter()
            .copied()
            .find(|value| value.name() == name)
            .ok_or_else(|| UnknownName {
                what: Self::WHAT,
                value: name.escape_debug().to_string(),
                known: Self::ALL.iter().map(|value| value.name()).collect(),
            })
    }
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct UnknownName {
    pub what: &'static str,
    pub value: String,
    pub known: Vec<&'static str>,
}

impl fmt::Display for UnknownName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let known = self.known.join(", ");
        write!(f, "unknown {} `{}`; known: {known}", self.what, self.value)
    }
}

/// Declares an enum with its spellings.
macro_rules! named {
    ($(#[$meta:meta])* $vis:vis enum $type:ident ($what:literal) {
        $($(#[$vmeta:meta])* $variant:ident = $name:literal,)+
    }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        $vis enum $type { $($(#[$vmeta])* $variant,)+ }

        impl $crate::model::Named for $type {
            const WHAT: &'static str = $what;
            const ALL: &'static [Self] = &[$(Self::$variant,)+];

            fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)+ }
            }
        }

        impl std::fmt::Display for $type {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.pad($crate::model::Named::name(*self))
            }
        }

        impl std::str::FromStr for $type {
            type Err = $crate::model::UnknownName;

            fn from_str(name: &str) -> Result<Self, Self::Err> {
                $crate::model::Named::from_name(name)
            }
        }
    };
}
pub(crate) use named;
