// Load a bundle with transformers.js: `node with_transformers_js.mjs PACKAGES BUNDLE REQUEST ANSWER`, where PACKAGES is
// the folder whose node_modules holds @huggingface/transformers. Nothing is fetched: remote models are off.
import { readFileSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import path from "node:path";
import { pathToFileURL } from "node:url";

const CLASSES = {
  "feature-extraction": "AutoModel",
  "text-classification": "AutoModelForSequenceClassification",
  "token-classification": "AutoModelForTokenClassification",
  "question-answering": "AutoModelForQuestionAnswering",
  "fill-mask": "AutoModelForMaskedLM",
};

const [packages, bundle, requestFile, answerFile] = process.argv.slice(2).map((item) => path.resolve(item));
const find = createRequire(path.join(packages, "package.json"));
const library = await import(pathToFileURL(find.resolve("@huggingface/transformers")));
const request = JSON.parse(readFileSync(requestFile, "utf-8"));
const name = path.basename(bundle);
const dtype = request.dtype; // chooses the file: onnx/model.onnx, or onnx/model_int8.onnx
const shown = `{ dtype: "${dtype}" }`;
library.env.allowRemoteModels = false;
library.env.localModelPath = path.dirname(bundle);

const plain = (tensor) => ({ shape: tensor.dims, data: Array.from(tensor.data, Number) });

// A failure is part of the answer.
async function check(loaded, run) {
  try {
    return { loaded, file: request.file, arrays: await run() };
  } catch (error) {
    return { loaded, error: `${error.name}: ${error.message}` };
  }
}

const checks = [];
const kind = CLASSES[request.task];
checks.push(
  await check(`${kind}.from_pretrained(bundle, ${shown})`, async () => {
    const tokenizer = await library.AutoTokenizer.from_pretrained(name);
    const model = await library[kind].from_pretrained(name, { dtype });
    const options = { padding: true, truncation: true, ...(request.pairs ? { text_pair: request.pairs } : {}) };
    const inputs = await tokenizer(request.texts, options);
    const outputs = await model(inputs);
    const wanted = request.outputs.filter((key) => outputs[key]);
    return Object.fromEntries([
      ["input_ids", plain(inputs.input_ids)],
      ...wanted.map((key) => [key, plain(outputs[key])]),
    ]);
  }),
);
if (request.pooling) {
  const options = { pooling: request.pooling, normalize: request.normalize };
  checks.push(
    await check(`pipeline("feature-extraction", bundle, ${shown})(texts, ${JSON.stringify(options)})`, async () => {
      const run = await library.pipeline("feature-extraction", name, { dtype });
      return { sentence_embedding: plain(await run(request.texts, options)) };
    }),
  );
}
if (request.task === "text-classification") {
  checks.push(
    await check(`pipeline("text-classification", bundle, ${shown})(texts, { top_k: null })`, async () => {
      const run = await library.pipeline("text-classification", name, { dtype });
      const labels = Object.values(run.model.config.id2label);
      const found = await run(request.texts, { top_k: null });
      const data = found.flatMap((scores) => labels.map((label) => scores.find((s) => s.label === label).score));
      return { scores: { shape: [found.length, labels.length], data } };
    }),
  );
}
const versions = {};
for (const item of ["@huggingface/transformers", "onnxruntime-node", "onnxruntime-common"]) {
  const file = path.join(packages, "node_modules", item, "package.json");
  versions[item] = JSON.parse(readFileSync(file, "utf-8")).version;
}
versions.node = process.versions.node;
writeFileSync(answerFile, JSON.stringify({ versions, checks }));
