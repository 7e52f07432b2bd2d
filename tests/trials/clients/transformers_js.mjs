// Continues texts and chats by transformers.js, greedily: `node transformers_js.mjs MODULE`, where MODULE is the
// library's file; a request on stdin, what it read and wrote on stdout, as JSON.
import { readFileSync } from "node:fs";
import { basename, dirname } from "node:path";
import { pathToFileURL } from "node:url";

const { AutoModelForCausalLM, AutoTokenizer, env } = await import(pathToFileURL(process.argv[2]).href);
const request = JSON.parse(readFileSync(0, "utf8"));
env.allowRemoteModels = false;
env.localModelPath = dirname(request.directory);

const name = basename(request.directory);
const tokenizer = await AutoTokenizer.from_pretrained(name);
const model = await AutoModelForCausalLM.from_pretrained(name, { dtype: request.dtype, device: "cpu" });
const inputs = [
  ...request.texts.map((text) => tokenizer(text)),
  ...request.chats.map((chat) =>
    tokenizer.apply_chat_template(chat, { add_generation_prompt: true, return_dict: true }),
  ),
];
const answers = [];
for (const input of inputs) {
  const output = await model.generate({ ...input, max_new_tokens: request.length, do_sample: false });
  const ids = Array.from(input.input_ids.data, Number);
  answers.push({ ids, continuation: Array.from(output.data, Number).slice(ids.length) });
}
console.log(JSON.stringify(answers));
