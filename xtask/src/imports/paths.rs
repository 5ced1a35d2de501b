//! What a path in a source file means: where it leads from the module it stands in, and what names `use` lines bring in.
//! What may lead where is the rule's business.

use std::collections::BTreeMap;

use proc_macro2::Span;
use syn::spanned::Spanned;
use syn::visit::Visit;

use super::{LIBRARY, MAIN};

/// The module that a file holds: `["table", "apply"]` for `table/apply.rs`; the library's root is empty.
pub fn module_of(file: &str) -> Vec<String> {
    let path = file.strip_suffix(".rs").unwrap_or(file);
    let path = path.strip_suffix("/mod").unwrap_or(path);
    if path == "lib" {
        return Vec::new();
    }
    path.split('/').map(str::to_owned).collect()
}

pub fn joined(module: &[String], name: &str) -> Vec<String> {
    let mut path = module.to_vec();
    path.push(name.to_owned());
    path
}

pub fn only_for_tests(attributes: &[syn::Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        if attribute.path().is_ident("test") {
            return true;
        }
        let syn::Meta::List(list) = &attribute.meta else {
            return false;
        };
        list.path.is_ident("cfg") && {
            let cfg: String = list.tokens.to_string().split_whitespace().collect();
            cfg == "test"
                || cfg.starts_with("all(test,")
                // The properties that the fuzz targets share with the tests.
                || cfg == "any(test,feature=\"fuzz\")"
        }
    })
}

/// A path after resolution: where it starts, and its words.
#[derive(Debug, Clone, PartialEq)]
pub enum Target {
    /// Below the library's root.
    Own(Vec<String>),
    /// Begins with another crate's name, or with a name we don't know (a local one).
    Other(Vec<String>),
}

pub fn resolve(module: &[String], words: &[String]) -> Target {
    let own = |base: &[String], rest: &[String]| Target::Own([base, rest].concat());
    let is_main = module.first().is_some_and(|top| top == MAIN);
    match words.first().map(String::as_str) {
        Some("crate") if is_main => own(&module[..1], &words[1..]),
        Some("crate") => own(&[], &words[1..]),
        Some(LIBRARY) if is_main => own(&[], &words[1..]),
        Some("self") => resolve_up(module, &words[1..]),
        Some("super") => resolve_up(module, words),
        _ => Target::Other(words.to_vec()),
    }
}

fn resolve_up(module: &[String], words: &[String]) -> Target {
    let supers = words.iter().take_while(|word| *word == "super").count();
    let base = &module[..module.len().saturating_sub(supers)];
    Target::Own([base, &words[supers..]].concat())
}

/// The names that a module's `use` lines bring in, with what each stands for, so that `use std::time; time::Instant::now()`
/// is seen. Names are taken from the whole module, whatever their scope.
pub fn aliases(module: &[String], items: &[syn::Item]) -> BTreeMap<String, Vec<String>> {
    struct Uses<'a> {
        module: &'a [String],
        aliases: BTreeMap<String, Vec<String>>,
    }
    impl<'ast> Visit<'ast> for Uses<'_> {
        fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
            for import in imports_of(&item.tree) {
                if let Some(name) = import.name {
                    let words = match resolve(self.module, &import.words) {
                        Target::Own(words) => [vec!["crate".to_owned()], words].concat(),
                        Target::Other(words) => words,
                    };
                    self.aliases.insert(name, words);
                }
            }
        }
        // Inline modules have names of their own.
        fn visit_item_mod(&mut self, _: &'ast syn::ItemMod) {}
    }
    let mut uses = Uses {
        module,
        aliases: BTreeMap::new(),
    };
    for item in items {
        uses.visit_item(item);
    }
    uses.aliases
}

/// One leaf of a `use` tree. A glob has no name.
pub struct Import {
    pub words: Vec<String>,
    pub name: Option<String>,
    pub span: Span,
}

pub fn imports_of(tree: &syn::UseTree) -> Vec<Import> {
    fn walk(tree: &syn::UseTree, prefix: &[String], found: &mut Vec<Import>) {
        match tree {
            syn::UseTree::Path(path) => {
                walk(&path.tree, &joined(prefix, &path.ident.to_string()), found);
            }
            syn::UseTree::Group(group) => {
                for tree in &group.items {
                    walk(tree, prefix, found);
                }
            }
            syn::UseTree::Name(name) => {
                leaf(prefix, &name.ident, &name.ident, found);
            }
            syn::UseTree::Rename(rename) => {
                leaf(prefix, &rename.ident, &rename.rename, found);
            }
            syn::UseTree::Glob(glob) => found.push(Import {
                words: prefix.to_vec(),
                name: None,
                span: glob.span(),
            }),
        }
    }
    fn leaf(prefix: &[String], ident: &syn::Ident, name: &syn::Ident, found: &mut Vec<Import>) {
        // `use a::b::{self}` brings in b.
        let brings_parent = ident == "self" && !prefix.is_empty();
        let words = if brings_parent {
            prefix.to_vec()
        } else {
            joined(prefix, &ident.to_string())
        };
        let name = if brings_parent && name == "self" {
            prefix.last().cloned()
        } else {
            Some(name.to_string())
        };
        found.push(Import {
            words,
            name,
            span: ident.span(),
        });
    }
    let mut found = Vec::new();
    walk(tree, &[], &mut found);
    found
}
