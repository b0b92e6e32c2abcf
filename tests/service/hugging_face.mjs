// What Hugging Face's own JavaScript client makes of the answers: node hugging_face.mjs PACKAGE URL
const [, , entry, url] = process.argv;
const { InferenceClient } = await import(entry);
const client = new InferenceClient();
const answers = {
  classify: await client.textClassification({ endpointUrl: `${url}/classify`, inputs: "the film is good" }),
  qa: await client.questionAnswering({
    endpointUrl: `${url}/qa`,
    inputs: { question: "Where does Clara live?", context: "Clara lives in Berkeley." },
  }),
};
console.log(JSON.stringify(answers));
