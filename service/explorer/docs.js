// The interface's schema, shown by Swagger UI (a global of /explorer/swagger-ui.js).

import { getJson, key } from "./api.js";

const $ = (id) => document.getElementById(id);

async function show() {
  try {
    const spec = await getJson("/openapi.json");
    $("key-form").hidden = $("problem").hidden = true;
    SwaggerUIBundle({
      spec,
      dom_id: "#swagger",
      deepLinking: true,
      validatorUrl: null,
      requestInterceptor: (request) => {
        if (key.get()) request.headers.Authorization ??= `Bearer ${key.get()}`;
        return request;
      },
    });
  } catch (error) {
    $("key-form").hidden = error.status !== 401;
    $("problem").textContent = error.message;
    $("problem").hidden = error.status === 401 && !key.get();
  }
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key.set($("key").value.trim());
  show();
});
await show();
