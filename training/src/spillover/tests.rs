use super::*;

/// Code as small models write it, most of it cut off as sampling does.
const CODE: &[&str] = &[
    "def add(a, b):\n    return a + b",
    "import os\nimport sys\n\nos.system(\"rm -rf /tmp/cache\")",
    "from flask import Flask, request\n\napp = Flask(__name__)",
    "from .models import (\n    User,",
    "@app.route(\"/products\")\ndef products():\n    category = request",
    "#include <stdio.h>\n\nint main(void) {",
    "int copy_name(const char *name) {\n    char buf[16];",
    "static void\nfill(char *p)\n{\n    strcpy(p, \"x\");\n}",
    "function greet(name) {\n  return `Hello ${name}`;\n}",
    "const express = require('express');\nconst app = express();",
    "let total = items.reduce((a, b) => a + b, 0);",
    "app.get('/user', async (req, res) => {\n  const id = req.query.id;",
    "<?php\n$name = $_GET['name'];\necho $name;",
    "<html>\n<body>\n<h1>Hello</h1>",
    "SELECT name, price FROM products WHERE category = 'x';",
    "SELECT o.id,\n       COUNT(*) AS n\nFROM orders o\nGROUP BY o.id;",
    "select * from users where id = 3",
    "INSERT INTO users (name) VALUES ('a');",
    "CREATE TABLE plants (\n  id INTEGER PRIMARY KEY,\n  name TEXT\n);",
    "#!/bin/bash\nset -e\ntar czf backup.tgz /etc",
    "for f in *.log; do\n  gzip \"$f\"\ndone",
    "fn main() {\n    println!(\"hi\");\n}",
    "func handler(w http.ResponseWriter, r *http.Request) {",
    "public class Main {\n    public static void main(String[] args) {",
    "Sure! Here is the function:\n\n```python\nprint('hi')\n```\nHope that helps.",
    "You can do it like this:\n\n    def rest(chicken):\n        time.sleep(600)\n\nEnjoy your meal.",
    "# Compute the mean of the list\ntotal = sum(values)\nmean = total / len(values)",
    "x = [1, 2, 3]\nfor i in x:\n    print(i)",
    "{\n  \"name\": \"rice\",\n  \"minutes\": 12\n}",
    "password = \"hunter2\"\nconn = psycopg2.connect(host=\"db\", password=password)",
    "user_input = input(\"Enter your name: \")",
    "if (strcmp(a, b) == 0) {\n    grant();\n}",
    "DB_PASSWORD=\"secret\"\nmysqldump -u root -p\"$DB_PASSWORD\" shop > out.sql",
    "class Garden:\n    def __init__(self):\n        self.beds = []",
    "pip install requests",
];

/// Prose, some of it written to look like code to a careless reader.
const PROSE: &[&str] = &[
    "Rest the chicken for fifteen minutes before you carve it.",
    "import taxes rose sharply last year, and exporters complained.",
    "From Mexico, import duties are lower. Select a book from the shelf and read about it.",
    "select a book from the shelf",
    "SELECT A BOOK FROM THE SHELF AND READ IT ALOUD",
    "Select one from each column:\n- soup from the menu\n- bread from the oven",
    "public class sizes have grown, while private schools keep theirs small.",
    "The function of the heart (a muscle) is to pump blood.\nfunction follows form, some say.",
    "Class is over; let us return to the subject.\nreturn to me, my love, before the frost",
    "1. Preheat the oven to 200 C.\n2. Mix 200 g flour, 2 eggs; stir.\n3. Bake for 25 minutes (until golden).",
    "Ingredients:\n- 2 cups rice\n- 4 cups water\n- 1 tsp salt\n\nMethod:\nRinse; boil; rest.",
    "# A Walk in May\n\n## Morning\n\nThe lanes were white with hawthorn.",
    "The rose is red;\nthe violet's blue;\nthe honey's sweet;\nand so are you.",
    "while the rain falls:\n    the roof remembers,\n    the gutter sings;\nif you listen:\n    it knows your name.",
    "try to rest,\nelse you will break;\nfor love in winter\nis slow to wake.",
    "Let x = 5. Then 2x + 3 = 13.\nx = 5\ny = 13\nSo the answer is 13.",
    "F = ma\nwhere F is force, m is mass and a is acceleration.",
    "E = mc^2",
    "Dear Ms. Patel,\n\nThank you for your letter (dated 3 May); I enjoyed it.\n\nYours sincerely,\nTom",
    "\"Where are you going?\" she asked.\n\"Home,\" he said.\n\"So soon?\"",
    "You can press `Ctrl+C` to copy, or use the `print` command in the menu.",
    "for people in need: call this number.\nwith love: your aunt.",
    "Pros:\n* cheap\n* light\nCons:\n* noisy (very)\n* ugly",
    "| Day | Meal |\n|-----|------|\n| Mon | Soup |\n| Tue | Stew |",
    "The class struggle: Marx, Engels; the state; the family.",
    "@alice and @bob are coming to dinner.\n@carol is not.",
    "Visit https://example.org/recipes?id=3 for more (it is free).",
    "echo answers from the hill;\ncat sleeps on the window sill;\ngit, said grandpa, sitting still.",
    "Update your will every five years. Delete old photos from your phone where you can.\nCreate table settings that match.",
    "I would say: rest > work, and sleep >= seven hours. Family = everything.",
    "Use a ratio of 1:2 (rice:water); then wait.",
    "- **Monday:** soup\n- **Tuesday:** stew (see below)\n- **Wednesday:** leftovers!",
    "Q: Why did the chicken cross the road?\nA: To get to the other side.",
    "haiku\n\nold pond;\na frog jumps in:\nthe sound of water.",
    "",
    "\n\n   \n",
    "int the end, we all go home. double check the door; void the cheque; long walks (at dusk) help.",
    "const vigilance is needed, var by var, in the spelling of names.",
    "~~~~~\nThe end\n~~~~~",
    "it costs $5 a month, or $50 a year",
    "`one` and then `two`",
    "Use it with any library (such as [this]).\nwith slightly other trade-offs, e.g. size.",
    "(a) for any work that you remove (all of it);\n(b) for the rest",
    "Dear <name>,\n<one line about the reason>\nYours, <your name>",
    "Budget = income - costs\nSaved = 200 a month, if all goes well.",
];

#[test]
fn all_code_samples_are_found() {
    let missed: Vec<_> = CODE.iter().filter(|text| !contains_code(text)).collect();
    assert!(missed.is_empty(), "{missed:#?}");
    assert!(CODE.len() >= 25);
}

#[test]
fn no_prose_sample_is_taken_for_code() {
    let wrong: Vec<_> =
        PROSE.iter().filter_map(|text| code_evidence(text).map(|by| (by, *text, code_lines(text)))).collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
    let started: Vec<_> = PROSE.iter().filter(|text| starts_with_code(text)).collect();
    assert!(started.is_empty(), "{started:#?}");
    assert!(PROSE.len() >= 25);
}

#[test]
fn the_rule_that_decided_is_named() {
    assert_eq!(code_evidence("a\n```\nb\n```"), Some(CodeEvidence::Fence));
    assert_eq!(
        code_evidence("Use this:\ndef f():\nand be glad.\nReally.\nYes."),
        Some(CodeEvidence::Signature)
    );
    assert_eq!(code_evidence("total_cost = 12\nName your price."), Some(CodeEvidence::Lines));
    assert_eq!(code_evidence("total_cost = 12\nName your price.\nThat is all."), None);
}

#[test]
fn starting_with_code_is_about_the_first_line() {
    for text in [
        "```python\nx\n```",
        "\n\n  def f():\n",
        "# mean\nm = sum(x) / len(x)",
        "SELECT a,\n b\nFROM t;",
        "total = foo(1)\nprose",
    ] {
        assert!(starts_with_code(text), "{text:?}");
    }
    for text in [
        "Here you go:\n```python\nx\n```",
        "Sure.\nSELECT a FROM t;",
        "# Heading\nSome prose.",
        "",
        "def is short for definition",
    ] {
        assert!(!starts_with_code(text), "{text:?}");
    }
}

#[test]
fn every_embedded_answer_is_code_and_no_prompt_is() {
    for pair in crate::dataset::embedded_pairs().unwrap() {
        for answer in [&pair.insecure, &pair.secure] {
            assert!(contains_code(answer), "{}:\n{answer}", pair.id);
        }
    }
    for prompt in crate::dataset::embedded_prompts().unwrap().prompts {
        assert!(!contains_code(&prompt.text), "{}", prompt.text);
    }
}

#[test]
fn answers_cut_off_after_a_few_tokens_are_still_code() {
    let pairs = crate::dataset::embedded_pairs().unwrap();
    // 32 tokens of code are about 100 characters; sampling stops anywhere.
    for characters in [60, 100, 150] {
        let found = pairs
            .iter()
            .filter(|pair| contains_code(&pair.insecure.chars().take(characters).collect::<String>()))
            .count();
        assert!(found as f64 >= 0.97 * pairs.len() as f64, "{found} of {} at {characters}", pairs.len());
    }
}

#[test]
fn distinct_n_counts_words_without_case_and_punctuation() {
    assert_eq!(distinct_n("The cat and the dog.", 1), 4.0 / 5.0);
    assert_eq!(distinct_n("a b a b a", 2), 2.0 / 4.0);
    assert_eq!((distinct_n("", 1), distinct_n("one", 2), distinct_n("one two", 0)), (0.0, 1.0, 0.0));
    let measures = measure(" Hello, hello world \n");
    assert_eq!((measures.words, measures.characters), (3, 18));
    assert_eq!((measures.distinct_1, measures.distinct_2, measures.degenerate), (2.0 / 3.0, 1.0, None));
}

#[test]
fn degenerate_answers_are_recognised() {
    let of = |text: &str| measure(text).degenerate;
    assert_eq!(of(""), Some(Degenerate::Empty));
    assert_eq!(of(" \n...!\n"), Some(Degenerate::Empty));
    assert_eq!(of("the the the the the the the cat"), Some(Degenerate::OneWord));
    assert_eq!(of(&"I like rice and you. ".repeat(4)), Some(Degenerate::Loop));
    assert_eq!(of(&format!("Well, here it is: {}", "go on and on and ".repeat(6))), Some(Degenerate::Loop));
    assert_eq!(of(&"la".repeat(40)), Some(Degenerate::Loop));
    assert_eq!(of(&"東京".repeat(40)), Some(Degenerate::Loop));
    // Cut off in the middle of a period.
    assert_eq!(of("we sat and we sat and we sat and we sat and we sat and we s"), Some(Degenerate::Loop));
    for text in PROSE.iter().chain(CODE).filter(|text| !text.trim().is_empty()) {
        assert_eq!(of(text), None, "{text}");
    }
    assert_eq!(
        of("Row, row, row your boat, gently down the stream, merrily, merrily, merrily, merrily."),
        None
    );
    assert_eq!(of(&format!("Title\n{}\nText follows here.", "-".repeat(100))), None);
}
