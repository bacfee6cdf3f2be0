// Shows /openapi.json in Swagger UI (see service/docs.py). The bundle defines SwaggerUIBundle.
SwaggerUIBundle({
  url: "/openapi.json",
  dom_id: "#api",
  deepLinking: true,
  displayRequestDuration: true,
  persistAuthorization: true,
});
