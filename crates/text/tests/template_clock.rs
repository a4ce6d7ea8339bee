//! Work that the template engine does not charge for is ended by the clock. In a process of its own, because the
//! abandoned thread goes on until the process ends.

use longhaul_text::{ChatTemplate, Message, TextError};

#[test]
fn work_without_cost_is_abandoned() {
    // Sixty doublings of a list are one cheap concatenation each, and a walk over 2^60 items together.
    let source =
        "{% set ns = namespace(l=[1]) %}{% for i in range(60) %}{% set ns.l = ns.l + ns.l %}{% endfor %}";
    let template = ChatTemplate::new(source, None, None, "dir/chat_template.jinja").unwrap();
    let error = template.render(&[Message::new("user", "Hi")], true).unwrap_err();
    // A later engine may charge for it, which is as good.
    assert!(matches!(error, TextError::TemplateTimeout { .. } | TextError::TemplateLimit { .. }), "{error}");
    assert!(error.to_string().starts_with("dir/chat_template.jinja"));
}
