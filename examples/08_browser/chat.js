// Text to token ids and back, as the artifact's own tokenizer and chat template say.

import { Template } from "./node_modules/@huggingface/jinja/dist/index.js";
import { Tokenizer } from "./node_modules/@huggingface/tokenizers/dist/tokenizers.min.mjs";
import { readJson, readText } from "./artifact.js";

export class Chat {
  /** Nothing where the artifact has no tokenizer. */
  static of(artifact) {
    return "tokenizer.json" in artifact.files ? new Chat(artifact) : undefined;
  }

  constructor(artifact) {
    this.config = readJson(artifact, "tokenizer_config.json");
    this.tokenizer = new Tokenizer(readJson(artifact, "tokenizer.json"), this.config);
    const template = "chat_template.jinja" in artifact.files ? readText(artifact, "chat_template.jinja") : this.config.chat_template;
    this.template = typeof template === "string" ? new Template(template) : undefined;
  }

  /** Token ids of a question, in the chat template where there is one: its text has the special tokens already. */
  encode(question) {
    if (!this.template) return this.tokenizer.encode(question).ids;
    const { bos_token, eos_token } = this.config;
    const messages = [{ role: "user", content: question }];
    const text = this.template.render({ messages, add_generation_prompt: true, bos_token: word(bos_token), eos_token: word(eos_token) });
    return this.tokenizer.encode(text, { add_special_tokens: false }).ids;
  }

  decode(ids) {
    return ids.length ? this.tokenizer.decode(ids, { skip_special_tokens: true }) : "";
  }
}

/** A special token in a configuration is a text, or an object with one. */
function word(token) {
  return token?.content ?? token;
}
