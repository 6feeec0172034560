# SPDX-License-Identifier: Apache-2.0
# Stands in for paws, which is on CRAN only: asks the broker as paws does and signs its requests to S3 (Signature Version 4),
# with the packages that paws is made of. Arguments: the endpoint, a bucket, how many seconds to go on.
library(curl)
library(digest)
library(jsonlite)

credentials <- function() {
  handle <- new_handle()
  handle_setheaders(handle, Authorization = readLines(Sys.getenv("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"), warn = FALSE))
  answer <- curl_fetch_memory(Sys.getenv("AWS_CONTAINER_CREDENTIALS_FULL_URI"), handle)
  said <- fromJSON(rawToChar(answer$content))
  if (answer$status_code != 200) stop(said$message)
  said
}

held <- NULL
current <- function() {
  # paws asks anew five minutes before the end; of credentials that last seconds, when they are over.
  if (is.null(held) || as.POSIXct(held$Expiration, format = "%Y-%m-%dT%H:%M:%S", tz = "UTC") <= Sys.time() + 1) held <<- credentials()
  held
}

request <- function(method, path, body = "") {
  key <- current()
  endpoint <- commandArgs(TRUE)[1]
  now <- as.POSIXlt(Sys.time(), tz = "UTC")
  moment <- format(now, "%Y%m%dT%H%M%SZ")
  day <- format(now, "%Y%m%d")
  hash <- digest(body, "sha256", serialize = FALSE)
  headers <- c(host = sub("^http://", "", endpoint), "x-amz-content-sha256" = hash, "x-amz-date" = moment, "x-amz-security-token" = key$Token)
  names <- paste(names(headers), collapse = ";")
  canonical <- paste(method, path, "", paste0(names(headers), ":", headers, "\n", collapse = ""), names, hash, sep = "\n")
  scope <- paste(day, "eu-west-1", "s3", "aws4_request", sep = "/")
  text <- paste("AWS4-HMAC-SHA256", moment, scope, digest(canonical, "sha256", serialize = FALSE), sep = "\n")
  signing <- charToRaw(paste0("AWS4", key$SecretAccessKey))
  for (part in c(day, "eu-west-1", "s3", "aws4_request")) signing <- hmac(signing, part, "sha256", raw = TRUE)
  signature <- hmac(signing, text, "sha256")
  handle <- new_handle(customrequest = method)
  if (nzchar(body)) handle_setopt(handle, postfields = body)
  handle_setheaders(handle, .list = as.list(c(headers[-1], "Content-Type" = "text/csv", Authorization = paste0(
    "AWS4-HMAC-SHA256 Credential=", key$AccessKeyId, "/", scope, ", SignedHeaders=", names, ", Signature=", signature))))
  answer <- curl_fetch_memory(paste0(endpoint, path), handle)
  if (answer$status_code >= 300) stop(rawToChar(answer$content))
  rawToChar(answer$content)
}

bucket <- commandArgs(TRUE)[2]
end <- Sys.time() + as.numeric(commandArgs(TRUE)[3])
keys <- character()
count <- 0
repeat {
  count <- count + 1
  request("PUT", sprintf("/%s/r-%d", bucket, count), "1,2,3")
  keys <- union(keys, held$AccessKeyId)
  if (Sys.time() >= end) break
  Sys.sleep(0.3)
}
read <- vapply(seq_len(count), function(number) request("GET", sprintf("/%s/r-%d", bucket, number)), "")
listed <- length(gregexpr("<Key>r-", request("GET", paste0("/", bucket)), fixed = TRUE)[[1]])
cat(toJSON(list(keys = keys, count = count, listed = listed, whole = all(read == "1,2,3")), auto_unbox = TRUE), "\n")
