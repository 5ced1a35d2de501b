//! The import rule of tcpstate-user: a module uses only modules below it, the core does no I/O and reads no clock, and only
//! `kernel` knows aya and netlink. It reads the sources with syn and resolves the paths itself; what rustc would expand
//! (macros) is searched for paths token by token.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use proc_macro2::{Span, TokenStream, TokenTree};
use syn::spanned::Spanned;
use syn::visit::{self, Visit};

use paths::{Import, Target, aliases, imports_of, joined, module_of, only_for_tests, resolve};

mod paths;

/// The modules at the top of tcpstate-user, from the lowest layer up.
const LAYERS: &[&[&str]] = &[
    &["model", "filter"],
    &["table", "stats", "diagnose"],
    &["export", "tui", "record", "kernel", "owner"],
    &["config"],
    &["cli"],
    &["run"],
    &[MAIN],
];
/// Uses between modules of one layer that are allowed all the same.
const SIBLINGS: &[(&str, &str)] = &[("stats", "table"), ("filter", "model")];
/// These modules are pure: no clock, no I/O, no aya, no tokio.
const CORE: &[&str] = &["model", "filter", "table", "stats", "diagnose"];
const NOT_IN_CORE: &[&str] = &[
    "aya",
    "aya_log",
    "axum",
    "caps",
    "hyper",
    "hyper_util",
    "libc",
    "procfs",
    "rustix",
    "std::env",
    "std::fs",
    "std::io",
    "std::net::TcpListener",
    "std::net::TcpStream",
    "std::net::ToSocketAddrs",
    "std::net::UdpSocket",
    "std::os",
    "std::process",
    "std::thread",
    "std::time::Instant",
    "std::time::SystemTime",
    "tokio",
    "tracing",
];
/// Macros of std that do I/O without naming it.
const PRINTING: &[&str] = &["dbg", "eprint", "eprintln", "print", "println"];
const ONLY_IN_KERNEL: &[&str] = &["aya", "aya_log", "netlink_*"];

/// The program's own crate, which is a thin client of the library.
const MAIN: &str = "main";
const LIBRARY: &str = "tcpstate_user";

/// One use that the rule forbids.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Broken {
    file: String,
    line: usize,
    why: String,
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.file, self.line, self.why)
    }
}

/// Everything below `src`, the source folder of tcpstate-user, that breaks the rule.
pub fn broken_in(src: &Path) -> Result<Vec<Broken>> {
    let mut files = Vec::new();
    read(src, "", &mut files)?;
    check(&files)
}

/// Reads the Rust files below `folder`; their names are relative to the source folder.
fn read(folder: &Path, prefix: &str, files: &mut Vec<(String, String)>) -> Result<()> {
    let entries =
        fs::read_dir(folder).with_context(|| format!("can't list {}", folder.display()))?;
    for entry in entries {
        let entry = entry?;
        let name = format!("{prefix}{}", entry.file_name().display());
        if entry.file_type()?.is_dir() {
            read(&entry.path(), &format!("{name}/"), files)?;
        } else if name.ends_with(".rs") {
            let text = fs::read_to_string(entry.path())
                .with_context(|| format!("can't read {}", entry.path().display()))?;
            files.push((name, text));
        }
    }
    Ok(())
}

/// Checks files, each with its name below the source folder and its text.
fn check(files: &[(String, String)]) -> Result<Vec<Broken>> {
    let mut parsed = Vec::new();
    for (name, text) in files {
        let file = syn::parse_file(text).with_context(|| format!("can't parse {name}"))?;
        parsed.push((name, module_of(name), file));
    }
    // `#[cfg(test)] mod x;` frees the files of x.
    let mut of_tests = Vec::new();
    for (_, module, file) in &parsed {
        for item in &file.items {
            if let syn::Item::Mod(item) = item
                && item.content.is_none()
                && only_for_tests(&item.attrs)
            {
                of_tests.push(joined(module, &item.ident.to_string()));
            }
        }
    }
    let mut broken = Vec::new();
    for (name, module, file) in &parsed {
        if only_for_tests(&file.attrs) || of_tests.iter().any(|test| module.starts_with(test)) {
            continue;
        }
        let mut checker = Checker {
            file: name,
            module: module.clone(),
            aliases: aliases(module, &file.items),
            broken: Vec::new(),
        };
        checker.has_a_layer();
        checker.visit_file(file);
        broken.append(&mut checker.broken);
    }
    broken.sort();
    broken.dedup();
    Ok(broken)
}

struct Checker<'a> {
    file: &'a str,
    module: Vec<String>,
    aliases: BTreeMap<String, Vec<String>>,
    broken: Vec<Broken>,
}

impl Checker<'_> {
    fn report(&mut self, span: Span, why: String) {
        self.broken.push(Broken {
            file: self.file.to_owned(),
            line: span.start().line,
            why,
        });
    }

    /// The top module that the file belongs to. The library's root has none: it only declares modules.
    fn top(&self) -> Option<String> {
        self.module.first().cloned()
    }

    fn is_core(&self) -> bool {
        self.top().is_some_and(|top| CORE.contains(&top.as_str()))
    }

    fn has_a_layer(&mut self) {
        if let Some(top) = self.top()
            && layer(&top).is_none()
        {
            self.report(
                Span::call_site(),
                format!("module {top} has no layer; give it one in xtask/src/imports.rs"),
            );
        }
    }

    fn path(&mut self, words: &[String], span: Span) {
        let mut words = words.to_vec();
        if let Some(meaning) = self.aliases.get(&words[0]) {
            words.splice(..1, meaning.iter().cloned());
        }
        match resolve(&self.module, &words) {
            Target::Own(words) => self.own(&words, span),
            Target::Other(words) => self.other(&words, span),
        }
    }

    fn own(&mut self, words: &[String], span: Span) {
        // The library's root may name what it declares.
        let (Some(from), Some(to)) = (self.top(), words.first()) else {
            return;
        };
        if from == *to || SIBLINGS.contains(&(&from, to)) {
            return;
        }
        match (layer(&from), layer(to)) {
            (_, None) => self.report(
                span,
                format!(
                    "{from} uses {to} by the crate's root, which says no layer; name its module"
                ),
            ),
            (Some(above), Some(below)) if below >= above => {
                self.report(span, format!("{from} uses {to}, which is not below it"));
            }
            _ => {}
        }
    }

    fn other(&mut self, words: &[String], span: Span) {
        let Some(from) = self.top() else { return };
        let path = words.join("::");
        if from != "kernel" && ONLY_IN_KERNEL.iter().any(|name| covers(name, words)) {
            self.report(
                span,
                format!("{from} uses {path}, which only kernel may know"),
            );
        }
        if self.is_core() && !is_errno(words) && NOT_IN_CORE.iter().any(|name| covers(name, words))
        {
            self.report(span, format!("{from} uses {path}, but the core is pure"));
        }
    }

    /// `use x::*` brings in everything below x, forbidden or not.
    fn glob(&mut self, import: &Import) {
        match resolve(&self.module, &import.words) {
            Target::Own(words) if words.is_empty() && !self.module.is_empty() => {
                self.report(
                    import.span,
                    "a glob import of the crate's root hides layers".to_owned(),
                );
            }
            Target::Own(words) => self.own(&words, import.span),
            Target::Other(words) => {
                let hides = |name: &&&str| name.starts_with(&format!("{}::", words.join("::")));
                if self.is_core() && NOT_IN_CORE.iter().any(|name| hides(&name)) {
                    self.report(
                        import.span,
                        format!(
                            "a glob import of {} hides what the core may not use",
                            words.join("::")
                        ),
                    );
                }
                self.other(&words, import.span);
            }
        }
    }

    /// Paths in a macro's tokens, and what macros print.
    fn tokens(&mut self, tokens: TokenStream) {
        let mut words: Vec<String> = Vec::new();
        let mut start = Span::call_site();
        let mut colons = 0;
        for token in tokens {
            match token {
                TokenTree::Ident(ident) => {
                    if colons != 2 {
                        self.token_path(&mut words, start);
                    }
                    if words.is_empty() {
                        start = ident.span();
                    }
                    words.push(ident.to_string());
                    colons = 0;
                }
                TokenTree::Punct(mark) if mark.as_char() == ':' => colons += 1,
                TokenTree::Punct(mark) if mark.as_char() == '!' => {
                    if let [name] = words.as_slice() {
                        let name = name.clone();
                        self.macro_name(&name, start);
                    }
                    self.token_path(&mut words, start);
                    colons = 0;
                }
                other => {
                    self.token_path(&mut words, start);
                    colons = 0;
                    if let TokenTree::Group(group) = other {
                        self.tokens(group.stream());
                    }
                }
            }
        }
        self.token_path(&mut words, start);
    }

    fn token_path(&mut self, words: &mut Vec<String>, span: Span) {
        // A single word is a name of the macro's own.
        if words.len() > 1 {
            self.path(words, span);
        }
        words.clear();
    }

    fn macro_name(&mut self, name: &str, span: Span) {
        if self.is_core() && PRINTING.contains(&name) {
            self.report(span, format!("{name}! does I/O, but the core is pure"));
        }
    }
}

impl<'ast> Visit<'ast> for Checker<'_> {
    fn visit_item(&mut self, item: &'ast syn::Item) {
        let attributes: &[syn::Attribute] = match item {
            syn::Item::Mod(item) => &item.attrs,
            syn::Item::Use(item) => &item.attrs,
            syn::Item::Fn(item) => &item.attrs,
            syn::Item::Impl(item) => &item.attrs,
            syn::Item::Const(item) => &item.attrs,
            syn::Item::Struct(item) => &item.attrs,
            _ => &[],
        };
        if !only_for_tests(attributes) {
            visit::visit_item(self, item);
        }
    }

    fn visit_item_mod(&mut self, item: &'ast syn::ItemMod) {
        if let Some(path) = item
            .attrs
            .iter()
            .find(|attribute| attribute.path().is_ident("path"))
        {
            self.report(
                path.span(),
                "the rule finds modules by file name: no #[path]".to_owned(),
            );
        }
        let Some((_, items)) = &item.content else {
            return;
        };
        let inner = joined(&self.module, &item.ident.to_string());
        let outer_aliases = std::mem::replace(&mut self.aliases, aliases(&inner, items));
        let outer = std::mem::replace(&mut self.module, inner);
        self.has_a_layer();
        for item in items {
            self.visit_item(item);
        }
        self.module = outer;
        self.aliases = outer_aliases;
    }

    fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
        for import in imports_of(&item.tree) {
            if import.name.is_none() {
                self.glob(&import);
                continue;
            }
            self.path(&import.words, import.span);
        }
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        let words: Vec<String> = path
            .segments
            .iter()
            .map(|segment| segment.ident.to_string())
            .collect();
        self.path(&words, path.span());
        visit::visit_path(self, path);
    }

    fn visit_macro(&mut self, call: &'ast syn::Macro) {
        if let Some(name) = call.path.get_ident() {
            self.macro_name(&name.to_string(), name.span());
        }
        self.tokens(call.tokens.clone());
        visit::visit_macro(self, call);
    }

    fn visit_visibility(&mut self, _: &'ast syn::Visibility) {}
}

fn layer(module: &str) -> Option<usize> {
    LAYERS.iter().position(|modules| modules.contains(&module))
}

/// The kernel's error numbers are constants of libc, and pure.
fn is_errno(words: &[String]) -> bool {
    matches!(words, [libc, name] if libc == "libc" && name.starts_with('E'))
}

/// Whether `words` is `name` or lies below it. A `*` at the end of a name stands for any rest of that word.
fn covers(name: &str, words: &[String]) -> bool {
    let mut words = words.iter();
    name.split("::").all(|part| {
        words
            .next()
            .is_some_and(|word| match part.strip_suffix('*') {
                Some(prefix) => word.starts_with(prefix),
                None => word == part,
            })
    })
}

#[cfg(test)]
mod tests;
