// Continues texts by llama.cpp, greedily: `node llama_cpp.mjs MODULE`, where MODULE is node-llama-cpp's file; a request
// on stdin, what it read and wrote on stdout, as JSON. A chat is a text here: node-llama-cpp renders templates its way.
import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const { getLlama } = await import(pathToFileURL(process.argv[2]).href);
const request = JSON.parse(readFileSync(0, "utf8"));
const llama = await getLlama({ gpu: false, build: "never", skipDownload: true, logLevel: "error" });
const model = await llama.loadModel({ modelPath: request.file });
const answers = [];
for (const text of request.texts) {
  const ids = Array.from(model.tokenize(text, true));
  // Keys and values in float32, as transformers keeps them; llama.cpp's default is float16.
  const context = await model.createContext({
    contextSize: ids.length + request.length,
    threads: 1,
    flashAttention: false,
    experimentalKvCacheKeyType: "F32",
    experimentalKvCacheValueType: "F32",
  });
  const continuation = [];
  const written = context.getSequence().evaluate(ids, { temperature: 0, yieldEogToken: true });
  while (continuation.length < request.length) {
    continuation.push((await written.next()).value);
  }
  answers.push({ ids, continuation });
  await context.dispose();
}
console.log(JSON.stringify(answers));
process.exit(0);
