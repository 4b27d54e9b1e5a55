-- Gives failures on the OpenAI paths the shape that OpenAI's clients read. Runs on those paths only
-- and touches nothing but the body of an error, which is a google.rpc.Status in JSON: the
-- transcoder's, where the service failed, or the edge's own.

-- As in libs/openai, which words the errors that come in mid-stream.
local TYPES = {
  ["401"] = "authentication_error",
  ["403"] = "permission_error",
  ["404"] = "not_found_error",
  ["429"] = "rate_limit_error",
}

-- Returns the first value of each key whose value is a string, both still escaped as in the JSON.
-- Walks over whole string literals, so that text inside one is never taken for structure.
local function first_strings(json)
  local found, key, position = {}, nil, 1
  while true do
    local open = json:find('"', position, true)
    if open == nil then return found end
    local close = open + 1
    while json:byte(close) ~= 34 do -- a closing quote
      if close > #json then return found end
      close = close + (json:byte(close) == 92 and 2 or 1) -- a backslash takes the next along
    end
    local text = json:sub(open + 1, close - 1)
    if json:find("^%s*:", close + 1) then
      key = text
    elseif key ~= nil then
      found[key] = found[key] or text
      key = nil
    end
    position = close + 1
  end
end

local function quoted(text)
  return text and '"' .. text .. '"' or "null"
end

function envoy_on_response(handle)
  local status = handle:headers():get(":status")
  if status:byte(1) < 52 then return end -- below 4xx

  local body = handle:body(true)
  local found = first_strings(body:getBytes(0, body:length()))
  local headers = handle:headers() -- anew: what was got before the body was waited for is stale
  local delay = (found["retry_delay"] or ""):match("^[%d.]+")
  if delay then
    headers:replace("retry-after", string.format("%d", math.ceil(tonumber(delay))))
  end
  headers:replace("content-type", "application/json")
  local kind = TYPES[status] or (status:byte(1) == 52 and "invalid_request_error" or "api_error")
  body:setBytes(
    '{"error":{"message":' .. quoted(found["message"] or "")
      .. ',"type":"' .. kind .. '"'
      .. ',"param":' .. quoted(found["field"])
      .. ',"code":' .. quoted(found["reason"] and found["reason"]:lower()) .. "}}"
  )
end
