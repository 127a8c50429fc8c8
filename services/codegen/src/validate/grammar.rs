//! The supported languages, and the node kinds of their tree-sitter grammars.

use tree_sitter_language::LanguageFn;

/// A language that can be analysed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Language {
    Python,
    JavaScript,
    TypeScript,
    /// TypeScript with JSX.
    Tsx,
    Java,
    Cpp,
    CSharp,
}

/// The node kinds of a grammar by their role, and the names of their fields.
pub(super) struct Grammar {
    language: LanguageFn,
    /// Nodes that open a scope.
    pub(super) scopes: &'static [&'static str],
    pub(super) functions: &'static [&'static str],
    pub(super) classes: &'static [&'static str],
    /// Each adds 1 to the cyclomatic complexity.
    pub(super) branches: &'static [&'static str],
    pub(super) comments: &'static [&'static str],
    /// Calls and object creations: kind, field of the callee, prefix of its path.
    pub(super) calls: &'static [(&'static str, &'static str, &'static str)],
    /// Member accesses: kind, field of the object, field of the member.
    pub(super) members: &'static [(&'static str, &'static str, &'static str)],
    /// Nodes that stand for their last child, such as parentheses.
    pub(super) wrappers: &'static [&'static str],
    /// Bindings: kind, field of the name, field of the value ("": none; "*": the last child).
    pub(super) bindings: &'static [(&'static str, &'static str, &'static str)],
    /// Namespaces that are removed from paths.
    pub(super) prefixes: &'static [&'static str],
}

impl Language {
    /// The language with this name in a request or after the fence of a code block.
    pub(crate) fn from_name(word: &str) -> Option<Language> {
        Some(match word.to_ascii_lowercase().as_str() {
            "python" | "py" | "python3" => Language::Python,
            "javascript" | "js" | "jsx" => Language::JavaScript,
            "typescript" | "ts" => Language::TypeScript,
            "tsx" => Language::Tsx,
            "java" => Language::Java,
            "cpp" | "c++" => Language::Cpp,
            "csharp" | "c#" | "cs" => Language::CSharp,
            _ => return None,
        })
    }

    /// The language's name in the API.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Language::Python => "python",
            Language::JavaScript => "javascript",
            Language::TypeScript | Language::Tsx => "typescript",
            Language::Java => "java",
            Language::Cpp => "cpp",
            Language::CSharp => "csharp",
        }
    }

    /// The language that determines the rules.
    pub(super) fn family(self) -> Language {
        match self {
            Language::TypeScript | Language::Tsx => Language::JavaScript,
            other => other,
        }
    }

    pub(super) fn grammar(self) -> &'static Grammar {
        match self {
            Language::Python => &PYTHON,
            Language::JavaScript => &JAVASCRIPT,
            Language::TypeScript => &TYPESCRIPT,
            Language::Tsx => &TSX,
            Language::Java => &JAVA,
            Language::Cpp => &CPP,
            Language::CSharp => &CSHARP,
        }
    }
}

impl Grammar {
    pub(super) fn language(&self) -> tree_sitter::Language {
        self.language.into()
    }
}

static PYTHON: Grammar = Grammar {
    language: tree_sitter_python::LANGUAGE,
    scopes: &["function_definition", "lambda", "class_definition"],
    functions: &["function_definition"],
    classes: &["class_definition"],
    branches: &[
        "if_statement",
        "elif_clause",
        "for_statement",
        "while_statement",
        "except_clause",
        "case_clause",
        "conditional_expression",
        "boolean_operator",
        "for_in_clause",
        "if_clause",
    ],
    comments: &["comment"],
    calls: &[("call", "function", "")],
    members: &[("attribute", "object", "attribute")],
    wrappers: &["parenthesized_expression", "await"],
    bindings: &[
        ("assignment", "left", "right"),
        ("named_expression", "name", "value"),
        ("for_statement", "left", ""),
        ("function_definition", "name", ""),
        ("class_definition", "name", ""),
    ],
    prefixes: &["builtins.", "__builtins__."],
};

const SCRIPT: Grammar = Grammar {
    language: tree_sitter_javascript::LANGUAGE,
    scopes: &[
        "function_declaration",
        "function_expression",
        "generator_function",
        "generator_function_declaration",
        "arrow_function",
        "method_definition",
        "class_body",
    ],
    functions: &[
        "function_declaration",
        "function_expression",
        "generator_function",
        "generator_function_declaration",
        "arrow_function",
        "method_definition",
    ],
    classes: &[
        "class_declaration",
        "class",
        "interface_declaration",
        "enum_declaration",
        "abstract_class_declaration",
    ],
    branches: &[
        "if_statement",
        "for_statement",
        "for_in_statement",
        "while_statement",
        "do_statement",
        "switch_case",
        "catch_clause",
        "ternary_expression",
        "&&",
        "||",
        "??",
    ],
    comments: &["comment", "hash_bang_line", "html_comment"],
    calls: &[("call_expression", "function", ""), ("new_expression", "constructor", "new ")],
    members: &[
        ("member_expression", "object", "property"),
        ("subscript_expression", "object", "index"),
    ],
    wrappers: &[
        "parenthesized_expression",
        "await_expression",
        "sequence_expression",
        "as_expression",
        "non_null_expression",
    ],
    bindings: &[
        ("variable_declarator", "name", "value"),
        ("assignment_expression", "left", "right"),
        ("function_declaration", "name", ""),
        ("generator_function_declaration", "name", ""),
        ("class_declaration", "name", ""),
    ],
    prefixes: &["globalThis.", "window.", "global.", "self."],
};
static JAVASCRIPT: Grammar = SCRIPT;
static TYPESCRIPT: Grammar =
    Grammar { language: tree_sitter_typescript::LANGUAGE_TYPESCRIPT, ..SCRIPT };
static TSX: Grammar = Grammar { language: tree_sitter_typescript::LANGUAGE_TSX, ..SCRIPT };

static JAVA: Grammar = Grammar {
    language: tree_sitter_java::LANGUAGE,
    scopes: &["method_declaration", "constructor_declaration", "lambda_expression", "class_body"],
    functions: &[
        "method_declaration",
        "constructor_declaration",
        "compact_constructor_declaration",
    ],
    classes: &[
        "class_declaration",
        "interface_declaration",
        "enum_declaration",
        "record_declaration",
        "annotation_type_declaration",
    ],
    branches: &[
        "if_statement",
        "for_statement",
        "enhanced_for_statement",
        "while_statement",
        "do_statement",
        "switch_label",
        "catch_clause",
        "ternary_expression",
        "&&",
        "||",
    ],
    comments: &["line_comment", "block_comment"],
    calls: &[("method_invocation", "name", ""), ("object_creation_expression", "type", "new ")],
    members: &[("field_access", "object", "field")],
    wrappers: &["parenthesized_expression"],
    bindings: &[
        ("variable_declarator", "name", "value"),
        ("formal_parameter", "name", ""),
        ("class_declaration", "name", ""),
    ],
    prefixes: &["java.lang.", "java.io.", "java.net.http.", "java.net."],
};

static CPP: Grammar = Grammar {
    language: tree_sitter_cpp::LANGUAGE,
    scopes: &["function_definition", "lambda_expression", "field_declaration_list"],
    functions: &["function_definition"],
    classes: &["class_specifier", "struct_specifier", "union_specifier", "enum_specifier"],
    branches: &[
        "if_statement",
        "for_statement",
        "for_range_loop",
        "while_statement",
        "do_statement",
        "case_statement",
        "catch_clause",
        "conditional_expression",
        "&&",
        "||",
        "and",
        "or",
    ],
    comments: &["comment"],
    calls: &[("call_expression", "function", "")],
    members: &[
        ("field_expression", "argument", "field"),
        ("qualified_identifier", "scope", "name"),
    ],
    wrappers: &["parenthesized_expression"],
    bindings: &[
        ("function_definition", "declarator", ""),
        ("init_declarator", "declarator", "value"),
        ("parameter_declaration", "declarator", ""),
    ],
    prefixes: &["std."],
};

static CSHARP: Grammar = Grammar {
    language: tree_sitter_c_sharp::LANGUAGE,
    scopes: &[
        "method_declaration",
        "constructor_declaration",
        "local_function_statement",
        "lambda_expression",
        "declaration_list",
    ],
    functions: &["method_declaration", "constructor_declaration", "local_function_statement"],
    classes: &[
        "class_declaration",
        "interface_declaration",
        "struct_declaration",
        "enum_declaration",
        "record_declaration",
    ],
    branches: &[
        "if_statement",
        "for_statement",
        "foreach_statement",
        "while_statement",
        "do_statement",
        "case",
        "switch_expression_arm",
        "catch_clause",
        "conditional_expression",
        "&&",
        "||",
        "??",
    ],
    comments: &["comment"],
    calls: &[
        ("invocation_expression", "function", ""),
        ("object_creation_expression", "type", "new "),
    ],
    members: &[
        ("member_access_expression", "expression", "name"),
        ("qualified_name", "qualifier", "name"),
    ],
    wrappers: &["parenthesized_expression", "await_expression"],
    bindings: &[
        ("variable_declarator", "name", "*"),
        ("parameter", "name", ""),
        ("class_declaration", "name", ""),
    ],
    prefixes: &[
        "System.Diagnostics.",
        "System.Runtime.Serialization.Formatters.Binary.",
        "System.Net.Http.",
        "System.Net.Sockets.",
        "System.Net.",
        "System.IO.",
        "global.",
    ],
};
