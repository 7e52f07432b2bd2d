// Continues token ids by transformers.js, greedily: `node generate.mjs TRANSFORMERS_JS MODEL_DIR DTYPE IDS LENGTH`.
// TRANSFORMERS_JS is the module's file, IDS a JSON list; prints the tokenizer's ids of MODEL_DIR/prompt.txt and the
// continuation as JSON.
import { readFileSync } from "node:fs";
import { basename, dirname, join } from "node:path";
import { pathToFileURL } from "node:url";

const [library, directory, dtype, ids, length] = process.argv.slice(2);
const { AutoModelForCausalLM, AutoTokenizer, Tensor, env } = await import(pathToFileURL(library).href);

env.allowRemoteModels = false;
env.localModelPath = dirname(directory);

const name = basename(directory);
const tokenizer = await AutoTokenizer.from_pretrained(name);
const model = await AutoModelForCausalLM.from_pretrained(name, { dtype, device: "cpu" });

const prompt = readFileSync(join(directory, "prompt.txt"), "utf8");
const encoded = Array.from(tokenizer.encode(prompt), Number);

const prompt_ids = JSON.parse(ids);
const tensor = (value) =>
  new Tensor("int64", BigInt64Array.from(prompt_ids, value), [1, prompt_ids.length]);
const output = await model.generate({
  input_ids: tensor((id) => BigInt(id)),
  attention_mask: tensor(() => 1n),
  max_new_tokens: Number(length),
  do_sample: false,
});
console.log(JSON.stringify({ encoded, continuation: Array.from(output.data, Number).slice(prompt_ids.length) }));
