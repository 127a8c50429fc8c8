//! Tests every rule with code that it must report and with similar code that it must not report.

use hapa_proto::codegen::v1::{ValidateCodeRequest, ValidateCodeResponse};

use super::*;

const TEST_TIMEOUT: Duration = Duration::from_secs(20);

fn validate_code(language: &str, code: &str) -> ValidateCodeResponse {
    let request = ValidateCodeRequest {
        code: code.to_owned(),
        language: language.to_owned(),
        ..ValidateCodeRequest::default()
    };
    let language = validate_request(&request).unwrap();
    request::respond(&request, language, TEST_TIMEOUT)
}

/// `line severity issue_type` of each issue.
fn findings(language: &str, code: &str) -> Vec<String> {
    let reply = validate_code(language, code);
    let line = |one: &hapa_proto::codegen::v1::ValidationIssue| {
        format!("{} {} {}", one.line_number, one.severity, one.issue_type)
    };
    reply.issues.iter().map(line).collect()
}

#[track_caller]
fn assert_finds(language: &str, expected: &str, codes: &[&str]) {
    for code in codes {
        let found = findings(language, code);
        let last = code.lines().count();
        assert_eq!(found, [format!("{last} {expected}")], "{code}");
    }
}

#[track_caller]
fn assert_no_findings(language: &str, codes: &[&str]) {
    for code in codes {
        assert_eq!(findings(language, code), Vec::<String>::new(), "{code}");
    }
}

#[test]
fn python_shells_are_found_through_every_alias() {
    assert_finds(
        "python",
        "critical shell_execution",
        &[
            "import os\nos.system(x)",
            "os.system(x)",
            "import os as o\no.system(x)",
            "from os import system\nsystem(x)",
            "from os import system as s, path\ns(x)",
            "from os import *\nsystem(x)",
            "import os\nrun = os.system\nrun(x)",
            "import os\no = os\no.popen(x)",
            "__import__('os').system(x)",
            "import os\ngetattr(os, 'system')(x)",
            "import importlib\nimportlib.import_module('os').system(x)",
            "import os.path\ndef f():\n    os.system(x)",
            "import subprocess as sp\nsp.run(x, shell=True)",
            "from subprocess import Popen\nPopen(f'ls {x}', shell=True)",
            "import subprocess\nsubprocess.getoutput(x)",
            "import os\ndef f(x, os=None): pass\nos.system(x)",
            "class Model:\n    import os\n    def f(self):\n        return __import__('os').system(self.x)",
        ],
    );
    assert_finds(
        "python",
        "warning shell_execution",
        &[
            "import os\nos.system('clear')",
            "import subprocess\nsubprocess.run('ls -l /')",
            "import subprocess\nsubprocess.check_output(f'ls {x}')",
            "import subprocess\nsubprocess.run('ls', shell=True)",
        ],
    );
}

#[test]
fn names_like_python_shells_are_not_reported() {
    assert_no_findings(
        "python",
        &[
            "# os.system(x)\nx = 'os.system(x)'\n",
            "\"\"\"os.system(x)\"\"\"",
            "class A:\n    def system(self, x): ...\nA().system(1)",
            "import platform\nplatform.system()",
            "def system(x): ...\nsystem(x)",
            "def f(os):\n    os.system(x)",
            "import subprocess\nsubprocess.run(['ls', x])",
            "import subprocess\nsubprocess.run(['ls', x], shell=False)",
            "import subprocess\nsubprocess.run(x)",
            "import os\nprint(os.system)",
            "from mine import system\nsystem(x)",
            "from . import os\nos.system(x)",
        ],
    );
}

#[test]
fn computed_python_code_is_reported_and_similar_names_are_not() {
    assert_finds(
        "python",
        "critical dynamic_code",
        &[
            "eval(x)",
            "exec(open('f').read())",
            "eval(f'{x} + 1')",
            "import builtins\nbuiltins.eval(x)",
            "compile(x, 'f', 'exec')",
            "class M:\n    def eval(self): ...\n\neval(x)",
            "e = eval\ne(x)",
        ],
    );
    assert_no_findings(
        "python",
        &[
            "eval('1 + 1')",
            "isinstance(x, int)",
            "model.eval()",
            "import re\nre.compile(x)",
            "import ast\nast.literal_eval(x)",
            "class A:\n    def __eval__(self): ...\n    def f(self):\n        self.exec(1)",
            "def eval(x): return x\neval(y)",
            "df.eval(x)",
        ],
    );
}

#[test]
fn unsafe_python_deserialization_is_reported() {
    assert_finds(
        "python",
        "warning unsafe_deserialization",
        &[
            "import pickle\npickle.load(f)",
            "from pickle import loads\nloads(b)",
            "import marshal\nmarshal.loads(b)",
            "import shelve\nshelve.open('s')",
            "import pandas as pd\npd.read_pickle(p)",
        ],
    );
    assert_finds(
        "python",
        "error unsafe_deserialization",
        &[
            "import yaml\nyaml.load(f)",
            "import yaml\nyaml.load(f, Loader=yaml.Loader)",
            "import yaml\nyaml.unsafe_load(f)",
        ],
    );
    assert_no_findings(
        "python",
        &[
            "import yaml\nyaml.load(f, Loader=yaml.SafeLoader)",
            "import yaml\nyaml.load(f, yaml.CSafeLoader)",
            "from yaml import SafeLoader, load\nload(f, Loader=SafeLoader)",
            "import yaml\nyaml.safe_load(f)",
            "import pickle\npickle.dumps(x)",
            "import json\njson.loads(x)",
            "loader.load(f)",
        ],
    );
}

#[test]
fn python_writes_outside_of_the_working_folder_are_reported() {
    assert_finds(
        "python",
        "error file_write_outside",
        &[
            "open('/etc/passwd', 'w')",
            "open('../x', mode='a')",
            "open('C:\\\\x', 'wb')",
            "open(f'/tmp/{name}', 'w')",
            "open('~/.bashrc', 'a')",
            "import shutil\nshutil.rmtree('/')",
            "import os\nos.remove('../../x')",
            "from pathlib import Path\nPath('/etc/x').write_text(y)",
            "from pathlib import Path\np = Path('/etc/x')\nPath('../x').open('w')",
        ],
    );
    assert_no_findings(
        "python",
        &[
            "open('/etc/passwd')",
            "open('out.txt', 'w')",
            "open('a/b..c', 'w')",
            "open(path, 'w')",
            "open(f'{name}/x', 'w')",
            "import os\nos.remove('x')",
            "items.remove('/x')",
            "from pathlib import Path\nPath('x').write_text(y)",
            "from pathlib import Path\nPath('/etc/x').open()",
        ],
    );
}

#[test]
fn python_network_calls_are_reported() {
    assert_finds(
        "python",
        "info network_access",
        &[
            "import requests\nrequests.get(u)",
            "import requests as r\nr.Session()",
            "from urllib.request import urlopen\nurlopen(u)",
            "import urllib.request\nurllib.request.urlopen(u)",
            "import socket\nsocket.socket()",
            "import http.client\nhttp.client.HTTPSConnection(h)",
        ],
    );
    assert_no_findings(
        "python",
        &[
            "requests = []\nrequests.append(1)",
            "from urllib.parse import quote\nquote(u)",
            "cache.get(u)",
        ],
    );
    assert_eq!(validate_code("python", "import requests\nrequests.get(u)").status, "valid");
}

#[test]
fn javascript_shells_are_found_through_every_alias() {
    for language in ["javascript", "typescript"] {
        assert_finds(
            language,
            "critical shell_execution",
            &[
                "const cp = require('child_process');\ncp.exec(x);",
                "const { exec } = require('node:child_process');\nexec(`ls ${x}`);",
                "const { exec: run } = require('child_process');\nrun(x);",
                "import { execSync as go } from 'child_process';\ngo(x);",
                "import * as cp from 'node:child_process';\ncp.exec(x);",
                "import cp from 'child_process';\ncp['exec'](x);",
                "require('child_process').exec(x);",
                "const util = require('util'), cp = require('child_process');\nconst run = util.promisify(cp.exec);\nrun(x);",
            ],
        );
        assert_finds(
            language,
            "warning shell_execution",
            &["require('child_process').exec('ls');"],
        );
    }
}

#[test]
fn other_dangerous_javascript_calls_are_reported_and_similar_names_are_not() {
    for language in ["javascript", "typescript"] {
        assert_finds(
            language,
            "critical dynamic_code",
            &[
                "eval(x);",
                "(0, eval)(x);",
                "window.eval(x);",
                "new Function('a', body);",
                "globalThis.Function(x);",
            ],
        );
        assert_finds(
            language,
            "error file_write_outside",
            &["const fs = require('fs');\nfs.writeFileSync('/etc/x', y);"],
        );
        assert_finds(
            language,
            "error unsafe_deserialization",
            &["const s = require('node-serialize');\ns.unserialize(x);"],
        );
        assert_finds(language, "info network_access", &["fetch(url);", "new WebSocket(url);"]);
        assert_no_findings(
            language,
            &[
                "/x/.exec(y);",
                "const re = /x/;\nre.exec(y);",
                "// eval(x)\nconst s = 'eval(x)';",
                "eval('1');",
                "new Function('return 1');",
                "const { execFile } = require('child_process');\nexecFile('ls', [x]);",
                "function eval2(x) {}\neval2(x);",
                "function f(fetch) { return fetch(1); }",
                "const fs = require('fs');\nfs.writeFileSync('x', y);",
                "JSON.parse(x);",
            ],
        );
    }
}

#[test]
fn typescript_with_and_without_jsx_is_parsed() {
    assert_no_findings(
        "typescript",
        &["const f = (x: number): string => `${x}`;", "interface A { eval(x: string): void }"],
    );
    let request = ValidateCodeRequest {
        code: "const a = <b>{c}</b>;".to_owned(),
        language: "ts".to_owned(),
        file_name: "a.tsx".to_owned(),
        ..ValidateCodeRequest::default()
    };
    assert!(request::respond(&request, validate_request(&request).unwrap(), TEST_TIMEOUT).is_valid);
}

#[test]
fn java_rules_report_dangerous_calls_only() {
    assert_finds(
        "java",
        "critical shell_execution",
        &[
            "class A { void f(String x) throws Exception {\nRuntime.getRuntime().exec(x); } }",
            "class A { void f(String x) throws Exception { Runtime r = Runtime.getRuntime();\nr.exec(x); } }",
            "class A { void f(String x) throws Exception {\njava.lang.Runtime.getRuntime().exec(x); } }",
        ],
    );
    assert_finds(
        "java",
        "warning shell_execution",
        &["class A { Object f(String x) {\nreturn new ProcessBuilder(x); } }"],
    );
    assert_finds(
        "java",
        "error unsafe_deserialization",
        &[
            "class A { Object f(InputStream s) throws Exception {\nreturn new ObjectInputStream(s).readObject(); } }",
        ],
    );
    assert_finds(
        "java",
        "info network_access",
        &["class A { Object f() throws Exception {\nreturn new Socket(h, 1); } }"],
    );
    assert_no_findings(
        "java",
        &[
            "class A { void f(Executor e, Runnable r) { e.exec(r); } }",
            "class A { String s = \"Runtime.getRuntime().exec(x)\"; }",
            "class A { Object f() { return new ProcessBuilder(\"ls\", \"-l\"); } }",
            "class A { Object f(OutputStream s) throws Exception { return new ObjectOutputStream(s); } }",
        ],
    );
}

#[test]
fn csharp_rules_report_dangerous_calls_only() {
    assert_finds(
        "csharp",
        "critical shell_execution",
        &[
            "class A { void F(string x) {\nProcess.Start(x); } }",
            "class A { void F(string x) {\nSystem.Diagnostics.Process.Start(x); } }",
        ],
    );
    assert_finds(
        "csharp",
        "warning shell_execution",
        &["class A { void F() { var p = new Process();\np.Start(); } }"],
    );
    assert_finds(
        "csharp",
        "error unsafe_deserialization",
        &["class A { object F() {\nreturn new BinaryFormatter(); } }"],
    );
    assert_finds(
        "csharp",
        "info network_access",
        &["class A { object F() {\nreturn new HttpClient(); } }"],
    );
    assert_no_findings(
        "csharp",
        &[
            "class A { void F(Thread t) { t.Start(); } }",
            "class A { string s = \"Process.Start(x)\"; }",
            "class A { object F() { return new Formatter(); } }",
        ],
    );
}

#[test]
fn cpp_rules_report_dangerous_calls_only() {
    assert_finds(
        "cpp",
        "critical shell_execution",
        &[
            "#include <cstdlib>\nvoid f(const char* x) {\nsystem(x); }",
            "void f(const char* x) {\nstd::system(x); }",
            "void f(const char* x) {\n::popen(x, \"r\"); }",
        ],
    );
    assert_finds(
        "cpp",
        "warning shell_execution",
        &["void f() {\nsystem(\"clear\"); }", "void f(char** a) {\nexecv(\"/bin/ls\", a); }"],
    );
    assert_no_findings(
        "cpp",
        &[
            "void f(File& a) { a.system(1); }",
            "void system(int x) {}\nvoid f() { system(1); }",
            "void f() { mine::system(x); }",
            "// system(x)\nconst char* s = \"system(x)\";",
            "void f() { execl(\"/bin/ls\", \"ls\", nullptr); }",
        ],
    );
}

#[test]
fn syntax_errors_have_their_line_in_every_language() {
    for (language, code) in [
        ("python", "x = 1\ndef f(:\n    pass\n"),
        ("python", "x = 1\nif x\n    y = 2\n"),
        ("python", "x = 1\nprint 'a'\n"),
        ("python", "x = 1\ny = (1, 2\n"),
        ("javascript", "let x;\nlet y = ;\n"),
        ("typescript", "let x: number;\nlet y: = 1;\n"),
        ("java", "class A {\nint x = ; }"),
        ("cpp", "int x;\nint y = ;\n"),
        ("csharp", "class A {\nint x = ; }"),
    ] {
        let reply = validate_code(language, code);
        let first = &reply.issues[0];
        assert_eq!(
            (first.issue_type.as_str(), first.line_number),
            ("syntax_error", 2),
            "{code}: {first:?}"
        );
        assert_eq!((reply.status.as_str(), reply.is_valid), ("invalid", false));
        assert_eq!(reply.functions_count, None);
    }
    assert!(!validate_code("python", "def f():\nx = 1\n").is_valid);
}

#[test]
fn wrong_python_indentation_is_a_syntax_error() {
    for code in [
        "x = 1\n  y = 2\n",
        "def f():\n    x = 1\n      y = 2\n",
        "def f():\n    x = 1\ny = 1\n    z = 2\n",
        "def f():\n    if x:\n        y = 1\n  else:\n        y = 2\n",
    ] {
        let reply = validate_code("python", code);
        assert!(reply.issues.iter().any(|one| one.issue_type == "syntax_error"), "{code}");
    }
    assert_no_findings(
        "python",
        &[
            "if x: y = 1; z = 2\nelse: y = 2\n",
            "if x:\n  y = 1\n  # a\n    # b\n# c\n  z = 2\nelif y:\n      z = 3\n",
            "x = [\n  1]; y = 2\nz = (1 +\n     2)\n",
            "try:\n\tx = 1\nexcept A:\n\ty = 1\nelse:\n\tz = 1\nfinally:\n\tpass\n",
            "class A:\n    @b\n    async def f(self):\n        async for x in y:\n            pass\n        else:\n            pass\n",
            "def f():\n    \"\"\"Doc\n  of lines.\n\"\"\"\n    match x:\n        case 1: pass\n        case _:\n            pass\n",
        ],
    );
}

#[test]
fn functions_classes_lines_and_complexity_are_counted() {
    let code = "# one\n\nclass A:\n    '''Doc\n    of two lines.'''\n    def f(self, x):\n        if x and x > 1:\n            return [y for y in x if y]\n        elif x or not x:\n            pass\n        return lambda: 1\n\nasync def g():\n    while True:  # for ever\n        pass\n";
    let reply = validate_code("python", code);
    assert_eq!((reply.functions_count, reply.classes_count), (Some(2), Some(1)));
    // 1; if, and, for, if, elif, or, while
    assert_eq!(reply.cyclomatic_complexity, Some(8));
    assert_eq!(reply.lines_of_code, 12);
    let code = "class A { constructor() {} get x() { return a ?? b; } }\nconst f = (x) => x ? 1 : 2;\nswitch (x) { case 1: break; default: }\n";
    let reply = validate_code("js", code);
    assert_eq!((reply.functions_count, reply.classes_count), (Some(3), Some(1)));
    assert_eq!(reply.cyclomatic_complexity, Some(4));
}

#[test]
fn listed_issues_are_limited_and_the_counts_are_complete() {
    let reply = validate_code("python", &"eval(x)\n".repeat(150));
    assert_eq!((reply.issues.len(), reply.issues_truncated), (100, true));
    assert_eq!((reply.critical_count, reply.error_count), (150, 0));
    assert!(reply.validation_id.starts_with("val_") && reply.validation_id.len() == 12);
}

#[test]
fn columns_count_characters() {
    let reply = validate_code("python", "x = '한글'; eval(y)\n");
    assert_eq!((reply.issues[0].line_number, reply.issues[0].column_number), (1, 11));
}

#[test]
fn invisible_characters_in_code_are_reported() {
    assert_eq!(findings("python", "x = 1\ny = 'a\u{202e}b'\n"), ["2 error invisible_character"]);
    assert_eq!(findings("python", "y = 'a\u{200b}b'\n"), ["1 warning invisible_character"]);
    assert_no_findings("python", &["y = '👩\u{200d}💻 한글'\n"]);
}

#[test]
fn style_is_checked_on_request_only() {
    let long = "x".repeat(120);
    let code = "from os import *\ndef f(x=[]):\n    try:\n        return x == None\n    except:\n        pass\n";
    let code = format!("{code}y = '{long}'\n");
    let mut request = ValidateCodeRequest { code, ..ValidateCodeRequest::default() };
    assert_eq!(request::respond(&request, Language::Python, TEST_TIMEOUT).info_count, 0);
    request.check_style = Some(true);
    let reply = request::respond(&request, Language::Python, TEST_TIMEOUT);
    let lines: Vec<_> = reply.issues.iter().map(|one| one.line_number).collect();
    assert_eq!((lines, reply.status.as_str()), (vec![1, 2, 4, 5, 7], "valid"));
}

#[test]
fn every_invalid_field_is_named() {
    let request = ValidateCodeRequest {
        code: "x".repeat(50_001),
        language: "cobol".to_owned(),
        file_name: "a\nb".to_owned(),
        session_id: "s".repeat(129),
        request_id: "a b".to_owned(),
        ..ValidateCodeRequest::default()
    };
    let fields = validate_request(&request).unwrap_err().fields();
    assert_eq!(fields, ["code", "session_id", "file_name", "request_id", "language"]);
    for language in ["py", "js", "ts", "c++", "c#", "Java"] {
        let request = ValidateCodeRequest {
            code: "x".to_owned(),
            language: language.to_owned(),
            ..Default::default()
        };
        assert!(validate_request(&request).is_ok(), "{language}");
    }
}

/// Code with the deepest possible nesting, or with maximum ambiguity.
fn adversarial_inputs() -> Vec<(Language, String)> {
    let languages = [
        Language::Python,
        Language::JavaScript,
        Language::TypeScript,
        Language::Tsx,
        Language::Java,
        Language::Cpp,
        Language::CSharp,
    ];
    let fill = |piece: &str| piece.repeat(50_000 / piece.chars().count());
    let pieces = [
        "(", "[", "{", "((a)", "a.", "a(", "not ", "- ", "a<", "<a>", "f'{", "\"", "lambda:",
        "if x:\n ", "a?b:", "x=", "a::", "() => ", "class A{", "`${", "/*", "한", ")", "a b ", "*",
        "R\"(", "a[0]",
    ];
    let all = languages
        .into_iter()
        .flat_map(|language| pieces.iter().map(move |piece| (language, fill(piece))));
    let mut all: Vec<_> = all.collect();
    all.extend(
        languages
            .map(|language| (language, format!("{}{}", "(".repeat(25_000), ")".repeat(25_000)))),
    );
    let indents: Vec<_> = (0..300).map(|deep| " ".repeat(deep) + "if x:\n").collect();
    all.push((Language::Python, indents.concat()));
    all
}

#[test]
fn deeply_nested_code_costs_no_stack_and_analysis_ends() {
    // Smaller than the default stack of a thread.
    let small = std::thread::Builder::new().stack_size(256 * 1024);
    let analysed = small.spawn(|| {
        let seen = adversarial_inputs().into_iter().map(|(language, code)| {
            // Whether the timeout expires depends on the machine, so `None` is valid too.
            let report = analyse(&code, language, Duration::from_millis(20), true);
            report.is_none_or(|report| report.complexity >= 1)
        });
        seen.filter(|is_valid| *is_valid).count()
    });
    assert_eq!(analysed.unwrap().join().unwrap(), adversarial_inputs().len());
    let deep = format!("x = {}1{}", "(".repeat(5_000), ")".repeat(5_000));
    assert_eq!(analyse(&deep, Language::Python, TEST_TIMEOUT, false).unwrap().findings, []);
}

#[test]
fn an_expired_timeout_gives_the_issue_not_checked() {
    let request = ValidateCodeRequest { code: "x".to_owned(), ..ValidateCodeRequest::default() };
    let reply = request::respond(&request, Language::Python, Duration::ZERO);
    assert_eq!((reply.status.as_str(), reply.is_valid), ("warning", false));
    assert_eq!(reply.issues[0].issue_type, "not_checked");
    assert_eq!(reply.cyclomatic_complexity, None);
}
