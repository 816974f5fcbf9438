// A certified OpenID provider on loopback, for tests/suites/test_oidc_provider.py. Its only argument is JSON: `port` (0:
// any), `keys` (private JSON Web Keys, the first one signs) and `algorithm`. The first line of output is the issuer.
import { createServer } from "node:http";
import Provider from "oidc-provider";

const { port, keys, algorithm } = JSON.parse(process.argv[2]);
let answer;
const server = createServer((request, response) => answer(request, response));
server.listen(port, "127.0.0.1", () => {
  const issuer = `http://127.0.0.1:${server.address().port}`;
  const provider = new Provider(issuer, {
    jwks: { keys },
    clients: [
      {
        client_id: "whale-bot",
        client_secret: "only-for-tests-on-loopback",
        grant_types: ["client_credentials"],
        redirect_uris: [],
        response_types: [],
        id_token_signed_response_alg: algorithm,
      },
    ],
    scopes: ["whales:read", "whales:write"],
    features: {
      devInteractions: { enabled: false },
      clientCredentials: { enabled: true },
      resourceIndicators: {
        enabled: true,
        getResourceServerInfo: (context, resource) => ({
          scope: "whales:read whales:write",
          audience: resource,
          accessTokenTTL: 300,
          accessTokenFormat: "jwt",
          jwt: { sign: { alg: algorithm } },
        }),
      },
    },
  });
  answer = provider.callback();
  console.log(issuer);
});
